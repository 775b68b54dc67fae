"""The tables that decide what is argued about, measured on chroma-nano. `python -m
benchmarks.nano`.
"""
