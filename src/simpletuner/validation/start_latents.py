"""Latents to start sampling from: an image with noise, and which part of it is kept.

B batch · C latent channels · H W latent side (image px / stride)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from simpletuner.data.sample_types import BucketedSample
from simpletuner.data.start_image import StartImageRequest, load_mask, load_start_pixels
from simpletuner.flow.objective import add_noise
from simpletuner.models.encoders import Vae
from simpletuner.models.family import ArchitectureConstants


@dataclass(frozen=True)
class StartLatents:
    """The start of one image.

    latents: (C, H, W) float32, scaled for the transformer. denoise: the noise level at which
    sampling starts, in (0, 1]. keep: (1, H, W) float32 in [0, 1], the share of the image that is
    kept; None keeps nothing.
    """

    latents: Tensor
    denoise: float
    keep: Tensor | None = None


def scale_moments(moments: Tensor, constants: ArchitectureConstants) -> Tensor:
    """Return the posterior mean of raw moments (B, 2C, H, W), scaled for the transformer.

    Moments with exactly C channels are latents without variance.
    """
    mean = moments.float()[:, : constants.latent_channels]
    return (mean - constants.latent_shift) * constants.latent_scale


def encode_start(
    request: StartImageRequest, placed: BucketedSample, vae: Vae, constants: ArchitectureConstants
) -> StartLatents:
    """Encode the fitted image; the mask is averaged over the pixels of each latent."""
    pixels = torch.from_numpy(load_start_pixels(placed)).permute(2, 0, 1)[None]
    latents = scale_moments(vae.encode(pixels.float() / 127.5 - 1), constants)[0]
    mask = load_mask(request, placed)
    keep = None
    if mask is not None:
        small = mask.resize((latents.shape[2], latents.shape[1]), Image.Resampling.BOX)
        levels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        keep = levels.view(1, latents.shape[1], latents.shape[2]).float() / 255
    return StartLatents(latents, request.denoise, keep)


def keep_covered_part(
    latents: Tensor, noise: Tensor, keep: Tensor
) -> Callable[[Tensor, float], Tensor]:
    """Return the function that puts the kept part of the image back after a sampling step.

    latents, noise: (B, C, H, W). keep: (B, 1, H, W). The kept part is the image with its own noise
    at the noise level that the step has reached, so that both parts have the same level.
    """

    def blend(x_sigma: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(x_sigma),), sigma, device=x_sigma.device)
        return keep * add_noise(latents, noise, level) + (1 - keep) * x_sigma

    return blend


def paste_kept_part(
    generated: Image.Image, request: StartImageRequest, placed: BucketedSample, feather_px: int
) -> Image.Image:
    """Return the generated image with the pixels of the original where the mask keeps them.

    The VAE does not give back the exact pixels, so the original's own are used; the edge of the
    mask is blurred over about feather_px pixels. Without a mask the image is returned unchanged.
    """
    mask = load_mask(request, placed)
    if mask is None:
        return generated
    original = Image.fromarray(load_start_pixels(placed))
    return Image.composite(
        original, generated, mask.filter(ImageFilter.GaussianBlur(feather_px / 2))
    )
