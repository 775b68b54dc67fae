"""The training objective: noise, the straight path between image and noise, and the loss.

B batch · C latent channels · H W latent side (image px / 8)
sigma is the noise fraction: 0 is the image, 1 is pure noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simpletuner.config.schema import FlowOptions
from simpletuner.randomness import seed_at


def sample_noise(
    visit_keys: tuple[str, ...], shape: torch.Size, seed: int, purpose: str = "noise"
) -> Tensor:
    """Return standard normal noise (B, C, H, W) on the CPU.

    The noise of a sample is addressed by its visit key alone, so it does not depend on the batch
    that the sample is in, and it is the same on every device.
    """
    return torch.stack(
        [
            torch.randn(
                shape[1:], generator=torch.Generator().manual_seed(seed_at(seed, purpose, key))
            )
            for key in visit_keys
        ]
    )


def sample_noise_pair(
    visit_keys: tuple[str, ...], shape: torch.Size, options: FlowOptions, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the noise of the target and that of the network's input, (B, C, H, W) on the CPU.

    With input_perturbation p the input is built from noise + p * other noise, while the target
    keeps the noise itself (Ning et al. 2023, Input Perturbation Reduces Exposure Bias). Without,
    both are one tensor.
    """
    noise = sample_noise(visit_keys, shape, seed)
    if options.input_perturbation <= 0:
        return noise, noise
    other = sample_noise(visit_keys, shape, seed, "perturbation")
    return noise, noise + options.input_perturbation * other


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the point on the straight path, (1 - sigma) * latents + sigma * noise.

    latents, noise: (B, C, H, W) float32. sigma: (B,) in [0, 1].
    """
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Return d x_sigma / d sigma = noise - latents, which is constant along the path."""
    return noise - latents


def loss_per_sample(
    prediction: Tensor,
    target: Tensor,
    sigma: Tensor,
    options: FlowOptions,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the loss of each sample, (B,) float32: the mean over all dimensions but the batch.

    prediction, target: (B, ...), compared in float32. sigma: (B,). weight: what the error of each
    element is multiplied by, of a shape that broadcasts to theirs; None is 1.
    """
    difference = prediction.float() - target.float()
    if options.loss_type == "l2":
        return _weighted_mean(difference.square(), weight)
    c = HUBER_SCHEDULES[options.huber_schedule](options.huber_c, sigma.float())
    # Times c this tends to d^2 for a large c; without, to 2 |d| for a small one.
    loss = 2 * pseudo_huber(difference, c.view(-1, *[1] * (difference.dim() - 1)))
    mean = _weighted_mean(loss, weight)
    return c * mean if options.loss_type == "huber" else mean


def _weighted_mean(errors: Tensor, weight: Tensor | None) -> Tensor:
    weighted = errors if weight is None else errors * weight
    return weighted.flatten(1).mean(1)


def pseudo_huber(difference: Tensor, c: Tensor) -> Tensor:
    """Return sqrt(d^2 + c^2) - c, computed as d^2 / (sqrt(d^2 + c^2) + c).

    The second form does not lose the digits of a small d to cancellation.
    """
    square = difference.square()
    return square / (torch.sqrt(square + c * c) + c)


def snr_schedule(c: float, sigma: Tensor) -> Tensor:
    """Return (1 - c) / (1 + r)^2 + c, where r is the root of the signal-to-noise ratio.

    The result is near c at the image and 1 at pure noise.
    """
    # 1e-4: sigma is 0 at the image, where the ratio is infinite.
    ratio = torch.sqrt((1 - sigma) / (sigma + 1e-4))
    return (1 - c) / (1 + ratio) ** 2 + c


# huber_c and sigma (B,) -> c of each sample. exponential: from 1 at the image to c at pure noise.
HUBER_SCHEDULES: dict[str, Callable[[float, Tensor], Tensor]] = {
    "constant": lambda c, sigma: torch.full_like(sigma, c),
    "exponential": lambda c, sigma: c**sigma,
    "snr": snr_schedule,
}
