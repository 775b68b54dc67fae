"""Solvers that turn noise into an image by following the predicted velocity.

A module of its own, apart from training's objective: validation images and `simpletuner generate`
share it, and a solver of a higher order is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def sigma_grid(steps: int, start: float = 1.0) -> list[float]:
    """Return steps + 1 noise levels from 1 to 0, evenly spaced.

    With a lower start, in (0, 1], it comes first and the levels above it are left out.
    """
    # A level that differs from start by rounding only would make a step of no length.
    grid: list[float] = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    return grid if start == 1 else [start, *(sigma for sigma in grid if sigma < start - 1e-9)]


@torch.no_grad()
def solve_euler(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    after_step: Callable[[Tensor, float], Tensor] = lambda x, sigma: x,
) -> Tensor:
    """Integrate with Euler's method: x += (next_sigma - sigma) * velocity(x, sigma).

    x: (B, C, H, W) float32, the noisy latents at sigmas[0]. after_step: from the result of a step
    and its noise level to what the next step begins with.
    """
    for sigma, next_sigma in pairwise(sigmas):
        x = after_step(x + (next_sigma - sigma) * velocity(x, sigma), next_sigma)
    return x
