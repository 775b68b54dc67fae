"""A penalty on the squared norm of an adapter's change of the weights.

It is that of "Preserve and Personalize" (arXiv 2505.19519), which keeps what the base knows by
keeping the change small. delta_norms.py has the formulas; here they have a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from simpletuner.adapters.adapted_linear import (
    AdaptedLinear,
    LoraLinear,
    LycorisLinear,
    adapted_modules,
)
from simpletuner.adapters.delta_norms import lokr_squared_norm, low_rank_squared_norm
from simpletuner.adapters.deltas import is_loha
from simpletuner.errors import ConfigError


def squared_delta_norm(module: AdaptedLinear) -> Tensor:
    """Return ||delta W||_F^2 at strength 1, a float32 number with a gradient.

    Raises ConfigError for adapters without a closed form: DoRA and LoHa.
    """
    if type(module) is LoraLinear:
        return module.scale**2 * low_rank_squared_norm(*_factors(module))
    if isinstance(module, LycorisLinear) and module.rows is None:
        factors = dict(module.factors.items())
        if not is_loha(factors):
            return module.scale**2 * lokr_squared_norm(factors)
    raise ConfigError(f"the norm of a {module.to_delta().kind}'s change has no closed form")


def _factors(module: LoraLinear) -> tuple[Tensor, Tensor]:
    """Return B and A; with initial factors, those of B A - B0 A0, of twice the rank."""
    if module.initial_up is None or module.initial_down is None:
        return module.up, module.down
    return (
        torch.cat([module.up, -module.initial_up], dim=1),
        torch.cat([module.down, module.initial_down]),
    )


class DeltaPenalty:
    """weight * the sum of ||delta W||_F^2 over all adapted modules, as a part of the loss.

    It is added to the loss of the first micro-batch of a step only, and so once in every step,
    whatever the number of micro-batches and processes.
    """

    def __init__(self, transformer: nn.Module, weight: float) -> None:
        self.modules = list(adapted_modules(transformer).values())
        self.weight = weight

    def __call__(self, place: int) -> Tensor | float:
        """Return what to add to the loss of a micro-batch. place: its number within the step."""
        # Its gradient does not depend on the batch, so one micro-batch carries it.
        return self.weight * _total(map(squared_delta_norm, self.modules)) if place == 0 else 0.0


def _total(norms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(norms)).sum()


def no_penalty(place: int) -> float:
    """Add nothing to the loss."""
    return 0.0


def delta_penalty(transformer: nn.Module, weight: float) -> Callable[[int], Tensor | float]:
    """Return the penalty; one that adds nothing where the weight is 0."""
    return DeltaPenalty(transformer, weight) if weight else no_penalty
