"""The world of chroma-nano: plain shapes on plain backgrounds, their captions, and a detector.

`recipes/nano` renders its images. This package has what a run needs to score its own images; it
does not use torch.
"""
