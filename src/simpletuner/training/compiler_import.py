"""Keep torch from importing its compiler in a run that compiles nothing.

Several functions of torch are wrapped so that compiled code leaves them out. The wrapper imports
torch._dynamo at its first call, 1.3 CPU seconds for the start of every run. It looks first for an
attribute of the function, which is set here to the function itself: without compiled code there is
nothing to leave it out of. Where torch names the attribute differently, only the time is lost.
"""

from __future__ import annotations

import inspect
from types import FunctionType

import torch
from torch import _compile
from torch.optim import AdamW, Optimizer
from torch.utils import checkpoint

ATTRIBUTE = "__dynamo_disable"


def avoid_compiler_import() -> None:
    """Mark the wrapped functions that a training calls."""
    for function in (*vars(Optimizer).values(), checkpoint.checkpoint):
        if (
            isinstance(function, FunctionType)
            and function.__code__.co_filename == _compile.__file__
        ):
            wrapped = vars(function).get("__wrapped__")
            if wrapped is not None:
                vars(wrapped).setdefault(ATTRIBUTE, wrapped)


class EagerAdamW(AdamW):
    """torch's AdamW without the break in a compiled graph around its step, which imports it too."""

    step = torch.no_grad()(inspect.unwrap(AdamW.step))
