"""Copies of LoRA factors in the dtype of the products, made once for all passes of a step.

The trained factors are float32 and the products bf16. Without copies, each pass of each module
casts both factors: three casts a factor and step with gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from simpletuner.adapters.adapted_linear import CopyActivity, FactorCopies, LoraLinear


class AdapterCopies:
    """The copies of all LoRA modules of a network.

    A copy is used inside `current` only. Whatever changes the trained factors outside of it (the
    optimizer, a checkpoint, averaged weights) therefore never meets an old copy.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._activity = CopyActivity()
        self._modules = [
            module
            for module in network.modules()
            if isinstance(module, LoraLinear) and module.down.dtype != dtype
        ]
        self._copies: list[Tensor] = []

    @contextmanager
    def current(self) -> Iterator[None]:
        """Copy the factors, and let every pass inside the context use the copies."""
        if self._modules:
            self._refresh()
        self._activity.active = True
        try:
            yield
        finally:
            self._activity.active = False

    @torch.no_grad()
    def _refresh(self) -> None:
        # At the first use, because the modules may have been moved to the device since.
        if not self._copies:
            for module in self._modules:
                down, up = (
                    torch.empty_like(factor, dtype=self._dtype)
                    for factor in (module.down, module.up)
                )
                module.factor_copies = FactorCopies(self._activity, down, up)
                self._copies += (down, up)
        factors = [
            factor.detach() for module in self._modules for factor in (module.down, module.up)
        ]
        # Into the same tensors, which the modules hold: a step allocates nothing.
        torch._foreach_copy_(self._copies, factors)
