"""Solvers that turn noise into an image by following the predicted velocity.

A module of its own, apart from training's objective: validation images and `simpletuner generate`
share it, and a solver of a higher order is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def sigma_grid(steps: int) -> list[float]:
    """Return steps + 1 noise levels from 1 to 0, evenly spaced."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


@torch.no_grad()
def solve_euler(
    velocity: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float]
) -> Tensor:
    """Integrate with Euler's method: x += (next_sigma - sigma) * velocity(x, sigma).

    x: (B, C, H, W) float32, the noisy latents at sigmas[0].
    """
    for sigma, next_sigma in pairwise(sigmas):
        x = x + (next_sigma - sigma) * velocity(x, sigma)
    return x
