"""From noise to a picture along the predicted velocity. Training, previews and `generate` share this time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def sigma_grid(steps: int) -> list[float]:
    """Steps + 1 noise levels from 1 to 0, evenly spaced."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


@torch.no_grad()
def solve_euler(
    velocity: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float]
) -> Tensor:
    """Straight steps: x += (sigma_next - sigma) * velocity(x, sigma).

    x: (B, C, H, W) float32, noise at sigmas[0].
    """
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * velocity(x, sigma)
    return x
