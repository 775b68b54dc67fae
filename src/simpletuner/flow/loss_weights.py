"""Weights of the loss by noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from simpletuner.config.loss_weights import parse_weight_points

SNR_LIMIT = 5.0
# The mean of min((1 - s)^2, 5 s^2) over uniform s: the two meet at s = 1 / (1 + sqrt 5).
MEETING_SIGMA = 1 / (1 + math.sqrt(SNR_LIMIT))
MEAN_MIN_SNR = (SNR_LIMIT * MEETING_SIGMA**3 + (1 - MEETING_SIGMA) ** 3) / 3


def loss_weight(setting: str, sigma: Tensor) -> Tensor:
    """Return the weight of each sample, (B,) float32. sigma: (B,) in [0, 1].

    setting: a name of WEIGHTS, whose weights have the mean 1 over uniform sigmas, or points such as
    "0:0.5, 0.5:1, 1:2": linear between them and constant outside.
    """
    sigma = sigma.float()
    if setting in WEIGHTS:
        return WEIGHTS[setting](sigma)
    points = parse_weight_points(setting)
    at = torch.tensor([point[0] for point in points], device=sigma.device)
    values = torch.tensor([point[1] for point in points], device=sigma.device)
    if len(points) == 1:
        return values.expand_as(sigma).clone()
    right = torch.searchsorted(at, sigma.contiguous()).clamp(1, len(points) - 1)
    low, high = at[right - 1], at[right]
    fraction = ((sigma - low) / (high - low)).clamp(0, 1)
    return torch.lerp(values[right - 1], values[right], fraction)


def cosmap(sigma: Tensor) -> Tensor:
    """Return 2 / (pi (1 - 2 s + 2 s^2)), the density CosMap of Esser et al. 2024 as a weight.

    It is largest at one half: 2 in units of its value at both ends.
    """
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def min_snr(sigma: Tensor) -> Tensor:
    """Return the Min-SNR weight (Hang et al. 2023, limit 5) of an error of the velocity.

    Min-SNR weighs the error of the image by min(SNR, 5). The image is x_sigma - sigma v, so the
    error of v has the weight s^2 min(SNR, 5) with SNR = ((1 - s) / s)^2: min((1 - s)^2, 5 s^2).
    """
    return torch.minimum((1 - sigma) ** 2, SNR_LIMIT * sigma**2) / MEAN_MIN_SNR


WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {"cosmap": cosmap, "min_snr": min_snr}
