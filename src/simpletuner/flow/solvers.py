"""From noise to a picture along the predicted velocity. Training, previews and `generate` share this time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from simpletuner.flow.shift import shifted


def sigma_grid(steps: int, shift: float | None = None) -> list[float]:
    """steps + 1 noise levels from 1 to 0, evenly spaced, then shifted when a shift is given."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, not {steps}")
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shifted(even, shift or 1.0).tolist()


@torch.no_grad()
def euler(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Straight steps: x += (sigma_next - sigma) * velocity(x, sigma).

    x: (B, C, H, W) float32, noise at sigmas[0]. on_step: told (steps done, x) after each.
    """
    for done, (sigma, following) in enumerate(pairwise(sigmas), start=1):
        x = x + (following - sigma) * velocity(x, sigma)
        if on_step is not None:
            on_step(done, x)
    return x
