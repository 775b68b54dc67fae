"""Generate latents from noise or from an image: Euler steps and classifier-free guidance.

B batch · C latent channels · H W latent side (image px / stride) · L text tokens · D text width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, groupby

import torch
from torch import Tensor, nn

from simpletuner.cache.batch_types import TextBatch, TextEmbedding
from simpletuner.flow.objective import add_noise
from simpletuner.flow.solvers import sigma_grid, solve_euler
from simpletuner.models.family import ArchitectureConstants
from simpletuner.peers import ALONE, Peers
from simpletuner.randomness import seed_at
from simpletuner.validation.inference import Inference, eval_mode
from simpletuner.validation.prompts import ImageSpec
from simpletuner.validation.start_latents import StartLatents, keep_covered_part

# Small images share a forward pass as long as it holds no more pixels than one image of
# 1024 x 1024: a batch then never needs more memory than the largest common image.
MAX_BATCH_PIXELS = 1024 * 1024
MAX_BATCH_IMAGES = 16

# Called after each sampling step with its number, from 1, and a function that returns the clean
# latents (B, C, H, W) that the step predicts. It must change nothing.
ObserveStep = Callable[[int, Callable[[], Tensor]], None]


def initial_noise(constants: ArchitectureConstants, seed: int, size_px: tuple[int, int]) -> Tensor:
    """Return standard normal noise (C, H, W), a pure function of seed and size.

    It is sampled on the CPU, so it is the same on every device.
    """
    width, height = size_px
    shape = (
        constants.latent_channels,
        height // constants.stride_px,
        width // constants.stride_px,
    )
    generator = torch.Generator().manual_seed(seed_at(seed, "picture", width, height))
    return torch.randn(shape, generator=generator)


def denoise(
    inference: Inference,
    transformer: nn.Module,
    text_embeddings: Sequence[TextEmbedding],
    noise: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    negative_embeddings: Sequence[TextEmbedding] | None = None,
    starts: Sequence[StartLatents] = (),
    observe: ObserveStep | None = None,
) -> Tensor:
    """Return latents (B, C, H, W) float32 on the CPU, by Euler steps from sigma 1 to 0.

    noise: (B, C, H, W). text_embeddings, negative_embeddings: one per image. Guidance above 1 uses
    v = v_negative + guidance (v_text - v_negative), both halves in one batch (Ho & Salimans 2022).
    At 1 and below the negative embeddings are not used. starts: one per image, with the same
    noise level, which is where sampling then begins; and either all with a mask, or none.

    Raises ValueError when guidance is above 1 and negative_embeddings is None.
    """
    guided = guidance > 1
    if guided and negative_embeddings is None:
        raise ValueError(
            "guidance above 1 needs negative_embeddings, those of the negative prompts"
        )
    embeddings = list(text_embeddings)
    if guided:
        embeddings += negative_embeddings or ()
    text = TextBatch.stack(embeddings).to(inference.device, inference.text_dtype)

    def velocity(x_sigma: Tensor, sigma: float) -> Tensor:
        doubled = torch.cat([x_sigma, x_sigma]) if guided else x_sigma
        sigmas = torch.full((len(doubled),), float(sigma))  # on the CPU: no synchronisation
        predicted = inference.predict_velocity(transformer, doubled, sigmas, text)
        if not guided:
            return predicted
        positive, negative = predicted.chunk(2)
        return negative + guidance * (positive - negative)

    solved = velocity if observe is None else _observed(velocity, observe)
    x = noise.to(inference.device, torch.float32)
    sigmas = sigma_grid(steps, starts[0].denoise) if starts else sigma_grid(steps)
    inference.family.prepare_sigmas(transformer, torch.tensor(sigmas[:-1]))
    with eval_mode(transformer):
        if not starts:
            return solve_euler(solved, x, sigmas).cpu()
        latents = torch.stack([start.latents for start in starts]).to(x)
        masks = [start.keep for start in starts if start.keep is not None]
        keep = torch.stack(masks).to(x) if masks else torch.zeros_like(x[:, :1])
        x_start = add_noise(latents, x, torch.full((len(x),), sigmas[0], device=x.device))
        blend = keep_covered_part(latents, x, keep)
        return solve_euler(solved, x_start, sigmas, blend).cpu()


def generate_latents(
    inference: Inference,
    transformer: nn.Module,
    image_specs: Sequence[ImageSpec],
    text_embedding: Callable[[str], TextEmbedding],
    *,
    steps: int,
    guidance: float,
    start_of: Callable[[ImageSpec], StartLatents | None] = lambda image_spec: None,
    peers: Peers = ALONE,
    observe: ObserveStep | None = None,
) -> Iterator[tuple[ImageSpec, Tensor]]:
    """Yield each image with its latents (1, C, H, W); neighbours of equal size share a batch.

    text_embedding: a text to its named tensors. start_of: what an image starts from; None for pure
    noise. An image from a batch equals the same image generated alone, up to rounding. Several
    processes share out whole batches, so each yields its own images only, with the same bits as one
    process.
    """

    def batch_key(image_spec: ImageSpec) -> tuple[tuple[int, int], float, bool]:
        start = start_of(image_spec)
        if start is None:
            return image_spec.size_px, 0.0, False
        return image_spec.size_px, start.denoise, start.keep is not None

    batches = [
        (size, level, batch)
        for (size, level, _), group in groupby(image_specs, key=batch_key)
        for batch in _split_into_batches(list(group), size, guidance)
    ]
    # What is shared out together has the same number of sampling steps.
    shared = [
        item
        for _, same_level in groupby(batches, key=lambda batch: batch[1])
        for item in peers.share_passes(list(same_level))
    ]
    for place, (size, _, batch) in shared:
        noise = [initial_noise(inference.constants, spec.seed, size) for spec in batch]
        latents = denoise(
            inference,
            transformer,
            [text_embedding(image_spec.prompt.text) for image_spec in batch],
            torch.stack(noise),
            steps=steps,
            guidance=guidance,
            negative_embeddings=[text_embedding(image_spec.prompt.negative) for image_spec in batch]
            if guidance > 1
            else None,
            starts=[start for each in batch if (start := start_of(each)) is not None],
            observe=observe,
        )
        if place is not None:
            yield from zip(batch, latents.split(1), strict=True)


def _observed(
    velocity: Callable[[Tensor, float], Tensor], observe: ObserveStep
) -> Callable[[Tensor, float], Tensor]:
    """Return the same velocity, which reports each of its calls."""
    numbers = count(1)

    def report(x_sigma: Tensor, sigma: float) -> Tensor:
        predicted = velocity(x_sigma, sigma)
        observe(next(numbers), lambda: x_sigma - sigma * predicted)
        return predicted

    return report


def _split_into_batches(
    image_specs: Sequence[ImageSpec], size: tuple[int, int], guidance: float
) -> Iterator[Sequence[ImageSpec]]:
    pixels = size[0] * size[1] * (2 if guidance > 1 else 1)
    per_pass = max(1, min(MAX_BATCH_IMAGES, MAX_BATCH_PIXELS // pixels))
    for start in range(0, len(image_specs), per_pass):
        yield image_specs[start : start + per_pass]
