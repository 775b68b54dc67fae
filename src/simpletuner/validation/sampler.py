"""From noise to latents: the solver of training's own path, and classifier-free guidance.

B batch · C latent channels · H W latent side (image px / stride) · L text tokens · D text width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from simpletuner.cache.batch_types import TextBatch
from simpletuner.flow.solvers import sigma_grid, solve_euler
from simpletuner.models.family import ArchitectureConstants
from simpletuner.randomness import seed_at
from simpletuner.validation.inference import Inference, eval_mode
from simpletuner.validation.prompts import ImageSpec

# Small pictures share a forward pass as long as it holds no more pixels than one of 1024 x 1024:
# the memory of a batch is then never above that of the picture people plan for.
MAX_BATCH_PIXELS = 1024 * 1024
MAX_BATCH_IMAGES = 16


def initial_noise(facts: ArchitectureConstants, seed: int, size_px: tuple[int, int]) -> Tensor:
    """(C, H, W) standard normal, a pure function of seed and size; drawn on the CPU on every device."""
    width, height = size_px
    shape = (facts.latent_channels, height // facts.stride_px, width // facts.stride_px)
    generator = torch.Generator().manual_seed(seed_at(seed, "picture", width, height))
    return torch.randn(shape, generator=generator)


def denoise(
    inference: Inference,
    transformer: nn.Module,
    text_rows: Sequence[Tensor],
    noise: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    negative_rows: Sequence[Tensor] | None = None,
) -> Tensor:
    """Latents (B, C, H, W) float32 on the CPU from noise (B, C, H, W), by Euler over sigma 1 -> 0.

    text_rows, negative_rows: one (L_i, D) each. Guidance above 1 takes
    v = v_negative + guidance (v_text - v_negative), both halves in one batch (Ho & Salimans 2022);
    at 1 and below the negative rows are not looked at.
    """
    guided = guidance > 1
    if guided and negative_rows is None:
        raise ValueError("guidance above 1 needs the rows of a negative prompt")
    rows = [*text_rows, *(negative_rows or ())] if guided else list(text_rows)
    text = TextBatch.stack(rows).to(inference.device, inference.text_dtype)

    def velocity(x_sigma: Tensor, sigma: float) -> Tensor:
        doubled = torch.cat([x_sigma, x_sigma]) if guided else x_sigma
        sigmas = torch.full((len(doubled),), float(sigma), device=doubled.device)
        predicted = inference.predict_velocity(transformer, doubled, sigmas, text)
        if not guided:
            return predicted
        wanted, unwanted = predicted.chunk(2)
        return unwanted + guidance * (wanted - unwanted)

    with eval_mode(transformer):
        return solve_euler(
            velocity, noise.to(inference.device, torch.float32), sigma_grid(steps)
        ).cpu()


def generate_latents(
    inference: Inference,
    transformer: nn.Module,
    pictures: Sequence[ImageSpec],
    rows: Callable[[str], Tensor],
    *,
    steps: int,
    guidance: float,
) -> Iterator[tuple[ImageSpec, Tensor]]:
    """Each picture with its latents (1, C, H, W), neighbours of equal size drawn in one batch.

    rows: a text to its (L, D) rows. A picture in a batch equals the picture drawn alone up to rounding.
    """
    for size, group in groupby(pictures, key=lambda picture: picture.size_px):
        same = list(group)
        pixels = size[0] * size[1] * (2 if guidance > 1 else 1)
        per_pass = max(1, min(MAX_BATCH_IMAGES, MAX_BATCH_PIXELS // pixels))
        for start in range(0, len(same), per_pass):
            batch = same[start : start + per_pass]
            drawn = denoise(
                inference,
                transformer,
                [rows(picture.prompt.text) for picture in batch],
                torch.stack(
                    [initial_noise(inference.constants, picture.seed, size) for picture in batch]
                ),
                steps=steps,
                guidance=guidance,
                negative_rows=[rows(picture.prompt.negative) for picture in batch]
                if guidance > 1
                else None,
            )
            yield from zip(batch, drawn.split(1), strict=True)
