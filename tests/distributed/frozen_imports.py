"""The last module that the server of ranks imports: what a rank would import itself, frozen.

A collection of garbage in a forked rank would walk through all of torch's objects, and copy the
pages that they are in.
"""

from __future__ import annotations

import gc
import importlib

for name in (
    "numpy.ctypeslib",
    "pytest",
    "PIL.JpegImagePlugin",
    "PIL.PpmImagePlugin",
    "simpletuner.models.chroma.family",
    "simpletuner.quantization.convert",
    "tests.distributed.test_replicated",
):
    importlib.import_module(name)
gc.collect()
gc.freeze()
