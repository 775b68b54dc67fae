"""The straight path between a picture and noise.

B batch · C latent channels · H W latent side. sigma is the noise fraction: 0 the picture, 1 pure noise.
"""

from __future__ import annotations

from torch import Tensor


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Point on the path: x_sigma = (1 - sigma) * latents + sigma * noise.

    latents, noise: (B, C, H, W) float32. sigma: (B,) in [0, 1].
    """
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """D x_sigma / d sigma, the same everywhere on the path: noise - latents."""
    return noise - latents
