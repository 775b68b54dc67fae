"""The squared norm of an adapter's change of the weights, without building the change.

out, in: sizes of the linear · r rank · A (r, in) and B (out, r)

For a LoRA, ||s B A||_F^2 = s^2 tr((B^T B) (A A^T)): two products of r x r. For a LoKr,
||s (w1 kron w2)||_F^2 = s^2 ||w1||_F^2 ||w2||_F^2. This is the penalty of "Preserve and
Personalize" (arXiv 2505.19519), which keeps what the base knows by keeping the change small.
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
from simpletuner.adapters.deltas import factor_matrix, is_loha
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
            sizes = (_lokr_squared_norm(factors, number) for number in "12")
            return module.scale**2 * next(sizes) * next(sizes)
    raise ConfigError(f"the norm of a {module.to_delta().kind}'s change has no closed form")


def low_rank_squared_norm(up: Tensor, down: Tensor) -> Tensor:
    """Return ||up @ down||_F^2. up: (out, r). down: (r, in)."""
    # tr(P Q) is the sum of P * Q^T, and both are symmetric.
    norm: Tensor = ((up.t() @ up) * (down @ down.t())).sum()
    return norm


def _factors(module: LoraLinear) -> tuple[Tensor, Tensor]:
    """Return B and A; with initial factors, those of B A - B0 A0, of twice the rank."""
    if module.initial_up is None or module.initial_down is None:
        return module.up, module.down
    return (
        torch.cat([module.up, -module.initial_up], dim=1),
        torch.cat([module.down, module.initial_down]),
    )


def _lokr_squared_norm(factors: dict[str, Tensor], number: str) -> Tensor:
    first, second = (factors.get(f"lokr_w{number}_{part}") for part in "ab")
    if first is not None and second is not None:
        return low_rank_squared_norm(first, second)
    return factor_matrix(factors, number).square().sum()


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
        return self.weight * _total(map(squared_delta_norm, self.modules)) if place == 0 else 0.0


def _total(norms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(norms)).sum()


def no_penalty(place: int) -> float:
    """Add nothing to the loss."""
    return 0.0


def delta_penalty(transformer: nn.Module, weight: float) -> Callable[[int], Tensor | float]:
    """Return the penalty; one that adds nothing where the weight is 0."""
    return DeltaPenalty(transformer, weight) if weight else no_penalty
