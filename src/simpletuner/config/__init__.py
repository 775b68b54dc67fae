"""Configuration: one declaration per option, read from a file, the environment and flags."""
