"""Routes: one file per noun, each with `router`; they translate, the modules beside this folder work."""
