"""The work of `simpletuner generate`: from a checked request to saved images."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.cli.kept_network import KeptNetwork
from simpletuner.config.environment import set_device_variables
from simpletuner.config.schema import DataOptions, ModelOptions
from simpletuner.data.start_image import StartImageRequest, place_start_image
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.validation.prompts import (
    ImageSpec,
    Prompt,
    make_image_specs,
    parse_sizes,
    prompt_texts,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.cache.batch_types import TextEmbedding
    from simpletuner.data.geometry import ImageSize
    from simpletuner.data.sample_types import BucketedSample
    from simpletuner.models.family import ModelFamily, ModelFiles
    from simpletuner.training.device import ComputeDevice
    from simpletuner.validation.sampling_preview import SamplingPreview
    from simpletuner.validation.start_latents import StartLatents


@dataclass(frozen=True)
class GenerationRequest:
    """A request to generate images, checked as far as possible without loading anything."""

    prompts: tuple[Prompt, ...]
    model: ModelOptions
    lora_path: Path | None
    strengths: tuple[float, ...]
    steps: int
    guidance: float
    seed: int
    size: str
    count: int
    output_dir: Path
    start: StartImageRequest | None = None
    preview: bool = False


def generate_images(
    request: GenerationRequest, emit: Emit, loaded_network: KeptNetwork | None = None
) -> list[Path]:
    """Generate and save all images; return the paths in order of strength, size, prompt and seed.

    Text encoder, transformer and VAE are in memory one after the other, never together; only with
    `loaded_network` the transformer stays in memory, for the next request.
    """
    network = KeptNetwork() if loaded_network is None else loaded_network
    set_device_variables(request.model.deterministic)
    from simpletuner.adapters.lora_io import read_summary as describe_lora
    from simpletuner.models.registry import get_family as family_named
    from simpletuner.training.device import select_device

    family = family_named(request.model.model_family)
    names = family.lora_conventions.names
    if request.lora_path is not None:  # reports a file that is not a LoRA before anything is loaded
        emit(NoticeIssued(f"{request.lora_path.name}: {describe_lora(request.lora_path, names)}"))
    source = family.locate_files(request.model, emit)
    device = select_device(request.model)
    placed = _place_images(request, family.read_constants(source).alignment_px, emit)
    texts = prompt_texts(request.prompts, request.guidance)

    def encode(texts: Sequence[str]) -> Sequence[TextEmbedding]:
        emit(NoticeIssued(f"encoding {len(texts)} text{'s' * (len(texts) > 1)}"))
        return family.load_text_encoder(source, request.model, device.device, emit).encode(texts)

    embeddings = network.embeddings(request.model, texts, encode)
    gc.collect()  # a reference cycle may keep the network; the next one needs its memory
    starts = network.make_room_for(lambda: _encode_starts(request, family, source, device, placed))
    preview = _make_preview(request, family, source, device, network)
    gc.collect()
    wanted = make_image_specs(request.prompts, tuple(placed), request.count, request.seed)
    if (start := request.start) is not None:
        name = start.image_path.name
        wanted = tuple(replace(spec, start=name, denoise=start.denoise) for spec in wanted)
    with preview.session() if preview is not None else nullcontext():
        drawn = _generate_latents(
            request, family, source, device, embeddings, starts, wanted, emit, network, preview
        )
    if loaded_network is None:
        network.drop()
    vae = network.make_room_for(lambda: family.load_vae(source, request.model, device.device))
    stride_px = family.read_constants(source).stride_px
    return [
        _save_image(
            request,
            source,
            strength,
            spec,
            network.make_room_for(partial(vae.decode, latents)),
            placed,
            stride_px,
        )
        for strength, spec, latents in drawn
    ]


def _place_images(
    request: GenerationRequest, alignment_px: int, emit: Emit
) -> dict[ImageSize, BucketedSample | None]:
    """Return the sizes to generate, each with the fitted start image, if there is one."""
    sizes, notes = parse_sizes(request.size, DataOptions(), alignment_px, "--size")
    for note in notes:
        emit(NoticeIssued(note))
    if request.start is None:
        return dict.fromkeys(sizes)
    path = request.start.image_path
    fitted = [place_start_image(path, size, alignment_px) for size in sizes]
    return {placed.bucket_px: placed for placed in fitted}


def _encode_starts(
    request: GenerationRequest,
    family: ModelFamily,
    source: ModelFiles,
    device: ComputeDevice,
    placed: Mapping[ImageSize, BucketedSample | None],
) -> dict[ImageSize, StartLatents]:
    """Return the latents to start from by size; the VAE is loaded only if there are any."""
    if request.start is None:
        return {}
    from simpletuner.validation.start_latents import encode_start

    vae = family.load_vae(source, request.model, device.device)
    constants = family.read_constants(source)
    return {
        size: encode_start(request.start, sample, vae, constants)
        for size, sample in placed.items()
        if sample is not None
    }


def _make_preview(
    request: GenerationRequest,
    family: ModelFamily,
    source: ModelFiles,
    device: ComputeDevice,
    network: KeptNetwork,
) -> SamplingPreview | None:
    """Return the preview in the output folder; the VAE is loaded for the first one of a model."""
    if not request.preview:
        return None
    from simpletuner.validation.sampling_preview import (
        PREVIEW_FILE,
        RgbProjection,
        SamplingPreview,
        fit_projection,
    )

    def fit() -> RgbProjection:
        vae = family.load_vae(source, request.model, device.device)
        return fit_projection(vae, family.read_constants(source))

    projection = network.projection(request.model, fit)
    return SamplingPreview(request.output_dir / PREVIEW_FILE, 1, lambda: projection)


def _save_image(
    request: GenerationRequest,
    source: ModelFiles,
    strength: float,
    spec: ImageSpec,
    pixels: Tensor,
    placed: Mapping[ImageSize, BucketedSample | None],
    feather_px: int,
) -> Path:
    """Save one image with its metadata, after the kept part of a start image is put back."""
    from simpletuner.validation.start_latents import paste_kept_part
    from simpletuner.validation.validation_images import (
        GenerationSettings,
        image_metadata,
        pixels_to_image,
        save_png,
    )

    weights = {}
    if tuned := request.model.pretrained_transformer_model_name_or_path:
        weights = {"transformer": "/".join(Path(tuned).parts[-2:])}
    if request.lora_path is not None:
        name = "/".join(request.lora_path.resolve().parts[-2:])
        weights |= {"lora": name, "strength": f"{strength:g}"}
    model = " x ".join([source.name, *weights.values()])
    image, start, sample = pixels_to_image(pixels), request.start, placed[spec.size_px]
    mask = ""
    if start is not None and sample is not None:
        image = paste_kept_part(image, start, sample, feather_px)
        mask = "" if start.mask_path is None else start.mask_path.name
    settings = GenerationSettings(request.steps, request.guidance, model)
    path = _unused_path(request.output_dir, spec)
    save_png(image, path, image_metadata(spec, settings, **weights, mask=mask))
    return path


def _generate_latents(
    request: GenerationRequest,
    family: ModelFamily,
    source: ModelFiles,
    device: ComputeDevice,
    embeddings: dict[str, TextEmbedding],
    starts: Mapping[ImageSize, StartLatents],
    wanted: tuple[ImageSpec, ...],
    emit: Emit,
    network: KeptNetwork,
    preview: SamplingPreview | None,
) -> list[tuple[float, ImageSpec, Tensor]]:
    """Generate the latents of every image at every strength."""
    from simpletuner.adapters.attachment import set_strength
    from simpletuner.validation.inference import Inference
    from simpletuner.validation.sampler import generate_latents

    transformer = network.transformer(
        network_key(request), lambda: _load_transformer(request, family, source, device, emit)
    )
    dtype = device.autocast_dtype or device.weights_dtype
    inference = Inference(
        family, family.read_constants(source), device.device, dtype, device.autocast
    )
    again = partial(
        generate_latents,
        inference,
        transformer,
        wanted,
        embeddings.__getitem__,
        steps=request.steps,
        guidance=request.guidance,
        start_of=lambda spec: starts.get(spec.size_px),
        observe=None if preview is None else preview.observe,
    )
    drawn = []
    with StageReporter(emit, "generate", len(wanted) * len(request.strengths), "images") as stage:
        for strength in request.strengths:
            if request.lora_path is not None:
                set_strength(transformer, strength)
            for spec, latents in again():
                drawn.append((strength, spec, latents))
                stage.advance()
    return drawn


def _load_transformer(
    request: GenerationRequest,
    family: ModelFamily,
    source: ModelFiles,
    device: ComputeDevice,
    emit: Emit,
) -> nn.Module:
    """Return the transformer with its LoRA, on the device."""
    import torch

    from simpletuner.adapters.lora_io import load_adapter
    from simpletuner.models.block_executor import block_memory_policy

    emit(NoticeIssued(f"loading {source.name}"))
    at = torch.device("cpu") if request.model.musubi_blocks_to_swap else device.device
    transformer = family.load_transformer(source, at, device.weights_dtype, request.model, emit)
    if request.lora_path is not None:
        load_adapter(
            transformer, request.lora_path, family.lora_conventions.names, request.strengths[0]
        )
    streamed = device.device.type == "cuda"
    memory = block_memory_policy(request.model, family.block_count(transformer), streamed)
    family.place_blocks(transformer, memory, device.device)
    family.compile_blocks(transformer, request.model)
    return transformer


def network_key(request: GenerationRequest) -> tuple[object, ...]:
    """Return what must be the same for two requests to use one transformer."""
    path = request.lora_path
    return (request.model, path, path.stat().st_mtime_ns if path is not None else 0)


def _unused_path(folder: Path, spec: ImageSpec) -> Path:
    """Return <prompt>-<seed>-<W>x<H>.png, with the first number appended that gives a new file."""
    stem = f"{spec.prompt.id}-{spec.seed}-{spec.size_px[0]}x{spec.size_px[1]}"
    path, number = folder / f"{stem}.png", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path
