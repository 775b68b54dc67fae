"""How far a predicted velocity is from the target, sample by sample, in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simpletuner.config.schema import FlowOptions


def loss_per_sample(
    prediction: Tensor, target: Tensor, sigma: Tensor, options: FlowOptions
) -> Tensor:
    """(B,) float32: the mean over everything but the batch. prediction, target: (B, ...). sigma: (B,)."""
    difference = prediction.float() - target.float()
    if options.loss_type == "l2":
        return difference.square().flatten(1).mean(1)
    c = HUBER_SCHEDULES[options.huber_schedule](options.huber_c, sigma.float())
    soft = 2 * pseudo_huber(difference, c.view(-1, *[1] * (difference.dim() - 1)))
    mean = soft.flatten(1).mean(1)
    return c * mean if options.loss_type == "huber" else mean


def pseudo_huber(difference: Tensor, c: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c, written so that small d do not cancel: d^2 / (sqrt(d^2 + c^2) + c)."""
    square = difference.square()
    return square / (torch.sqrt(square + c * c) + c)


def snr_schedule(c: float, sigma: Tensor) -> Tensor:
    """(1 - c) / (1 + s)^2 + c with s the root of signal over noise: near c at the picture, 1 at noise."""
    ratio = torch.sqrt((1 - sigma) / (sigma + 1e-4))
    return (1 - c) / (1 + ratio) ** 2 + c


# huber_c and sigma (B,) -> c of each sample. exponential: from 1 at the picture to c at pure noise.
HUBER_SCHEDULES: dict[str, Callable[[float, Tensor], Tensor]] = {
    "constant": lambda c, sigma: torch.full_like(sigma, c),
    "exponential": lambda c, sigma: c**sigma,
    "snr": snr_schedule,
}
