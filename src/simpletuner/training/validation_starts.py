"""The validation images of a run: from pure noise, from one image, or from those of a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from simpletuner.cache.latent_cache import LatentCacheResult
from simpletuner.config.schema import RunConfig
from simpletuner.data.sample_types import BucketedSample, MicroBatchPlan, SampleVisit
from simpletuner.data.start_image import StartImageRequest, place_start_image
from simpletuner.training.prepare import PreparedInputs, select_samples
from simpletuner.validation.held_out_loss import choose_samples
from simpletuner.validation.prompts import (
    ImageSpec,
    Prompt,
    make_image_specs,
    prompts_by_size,
    safe_file_name,
)
from simpletuner.validation.start_latents import StartLatents, encode_start

DATASET_IMAGES = 4  # from which validation_using_datasets starts
StartOf = Callable[[ImageSpec], StartLatents | None]
StartLoaders = dict[str, Callable[[], StartLatents]]  # by ImageSpec.start


def validation_seed(run: RunConfig) -> int:
    """Return the seed of the validation images: validation_seed, else that of the run."""
    chosen = run.validation.validation_seed
    return run.training.seed if chosen is None else chosen


def plan_validation_images(
    run: RunConfig,
    prepared: PreparedInputs,
    prompts: Sequence[Prompt],
    sizes: Sequence[tuple[int, int]],
    seed: int,
    device: torch.device,
) -> tuple[tuple[ImageSpec, ...], StartOf]:
    """Return all validation images, and the function that gives what each starts from.

    Start latents are loaded at their first use and stay on the CPU: an image's are encoded by the
    VAE, a dataset's are those of the cache.
    """
    options = run.validation
    specs: list[ImageSpec] = []
    loaders: StartLoaders = {}
    if options.validation_image is None:
        count, alignment_px = options.num_validation_images, prepared.constants.alignment_px
        specs += make_image_specs(prompts, sizes, count, seed, alignment_px)
    else:
        specs, loaders = _images_from_one(run, prepared, prompts, sizes, seed, device)
    if options.validation_using_datasets:
        more_specs, more_loaders = _images_from_dataset(run, prepared, seed)
        specs += more_specs
        loaders |= more_loaders
    loaded: dict[str, StartLatents] = {}

    def start_of(spec: ImageSpec) -> StartLatents | None:
        if not spec.start:
            return None
        if spec.start not in loaded:
            loaded[spec.start] = loaders[spec.start]()
        return loaded[spec.start]

    return tuple(specs), start_of


def _images_from_one(
    run: RunConfig,
    prepared: PreparedInputs,
    prompts: Sequence[Prompt],
    sizes: Sequence[tuple[int, int]],
    seed: int,
    device: torch.device,
) -> tuple[list[ImageSpec], StartLoaders]:
    """Return every prompt at every size, from validation_image; its content is part of the name."""
    path, level = Path(run.validation.validation_image or ""), run.validation.validation_denoise
    request = StartImageRequest(path, level)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]

    def encode(placed: BucketedSample) -> StartLatents:
        vae = prepared.family.load_vae(prepared.model_files, run.model, device)
        return encode_start(request, placed, vae, prepared.constants)

    specs: list[ImageSpec] = []
    loaders: StartLoaders = {}
    alignment_px = prepared.constants.alignment_px
    for size, members in prompts_by_size(prompts, sizes, alignment_px).items():
        placed = place_start_image(path, size, alignment_px)
        width, height = placed.bucket_px
        name = f"{path.name} ({digest}) {width}x{height}"
        loaders.setdefault(name, partial(encode, placed))
        count = run.validation.num_validation_images
        # Two sizes can give the same area to the image; a prompt is generated once there.
        done = {(spec.prompt.id, spec.start) for spec in specs}
        plain = [replace(prompt, size="") for prompt in members if (prompt.id, name) not in done]
        image_specs = make_image_specs(plain, [placed.bucket_px], count, seed)
        specs += [replace(spec, start=name, denoise=level) for spec in image_specs]
    return specs, loaders


def _images_from_dataset(
    run: RunConfig, prepared: PreparedInputs, seed: int
) -> tuple[list[ImageSpec], StartLoaders]:
    """Return DATASET_IMAGES images that start from cached latents, with their first captions."""
    cached = _samples_to_start_from(run, prepared)
    count = min(DATASET_IMAGES, len(cached.placed_samples))
    batches = prepared.make_batches(cached, "mean", run.training.seed)

    def load(index: int) -> StartLatents:
        plan = MicroBatchPlan(0, 0, (SampleVisit(index, 0, 0, 0),))
        return StartLatents(batches.load(plan).latents[0], run.validation.validation_denoise)

    specs: list[ImageSpec] = []
    loaders: StartLoaders = {}
    negative = run.validation.validation_negative_prompt
    for index in choose_samples(cached.placed_samples, count, run.training.seed):
        placed = cached.placed_samples[index]
        name = placed.sample.id
        prompt_id = f"from-{len(specs) + 1}-{safe_file_name(Path(name).stem)}".rstrip("-")
        prompt = Prompt(prompt_id, placed.sample.captions[0], negative)
        level = run.validation.validation_denoise
        specs.append(ImageSpec(prompt, 0, placed.bucket_px, seed, name, level))
        loaders[name] = partial(load, index)
    return specs, loaders


def _samples_to_start_from(run: RunConfig, prepared: PreparedInputs) -> LatentCacheResult:
    """Return the samples of eval_dataset_id, of all eval datasets, or of the training."""
    dataset_id = run.validation.eval_dataset_id
    chosen = select_samples(
        prepared.eval, lambda placed: dataset_id in (None, placed.sample.dataset)
    )
    return chosen if chosen.placed_samples else prepared.train
