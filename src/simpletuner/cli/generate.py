"""simpletuner generate: images from a base model and optionally a LoRA at any strength."""

from __future__ import annotations

import gc
import re
import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from simpletuner.config.schema import DataOptions, ModelOptions
from simpletuner.errors import ConfigError, Problem
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.events.terminal_sink import TerminalSink
from simpletuner.validation.prompts import (
    ImageSpec,
    Prompt,
    make_image_specs,
    parse_sizes,
    prompt_texts,
    safe_file_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.cache.batch_types import TextEmbedding
    from simpletuner.models.family import ModelFamily, ModelFiles
    from simpletuner.training.device import ComputeDevice

LORA_FILE = "pytorch_lora_weights.safetensors"
FLAVOURS = get_args(ModelOptions.model_fields["model_flavour"].annotation)
PRECISIONS = get_args(ModelOptions.model_fields["base_model_precision"].annotation)
DEFAULT_SIZE = {"nano": "128"}
PATH_TYPE = click.Path(path_type=Path)


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


@click.command(
    "generate", context_settings={"token_normalize_func": lambda name: name.replace("-", "_")}
)
@click.option("--prompt", "texts", multiple=True, required=True, help="Prompt; may be repeated.")
@click.option("--negative_prompt", default="", help="Negative prompt, used when --guidance > 1.")
@click.option(
    "--lora", type=PATH_TYPE, help="A LoRA file, a checkpoint or a run folder (of any training)."
)
@click.option(
    "--strength",
    default="1.0",
    show_default=True,
    help="LoRA strength; comma-separated values generate one image each.",
)
@click.option(
    "--model_flavour",
    type=click.Choice(FLAVOURS),
    help="Default: that of the LoRA's run, else base.",
)
@click.option(
    "--pretrained_model_name_or_path", help="Another base model (folder, hub id or single file)."
)
@click.option(
    "--pretrained_transformer_model_name_or_path",
    help="Another transformer, for example a fine-tuned one.",
)
@click.option(
    "--pretrained_t5_model_name_or_path", help="Another T5 (folder, hub id or single file)."
)
@click.option(
    "--pretrained_vae_model_name_or_path", help="Another VAE (folder, hub id or single file)."
)
@click.option(
    "--base_model_precision", type=click.Choice(PRECISIONS), help="Default: that of the LoRA's run."
)
@click.option("--config", type=PATH_TYPE, help="Configuration file for the model options.")
@click.option(
    "--steps", type=click.IntRange(1, 1000), default=20, show_default=True, help="Sampling steps."
)
@click.option(
    "--guidance",
    type=click.FloatRange(0, 30),
    default=1.0,
    show_default=True,
    help="Classifier-free guidance; 1 is off.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**62),
    default=42,
    show_default=True,
    help="Seed of the first image.",
)
@click.option(
    "--size",
    help="Image size in pixels: 512, 512x768 or a comma-separated list.  [default: 1024; nano 128]",
)
@click.option(
    "--count",
    type=click.IntRange(1, 1000),
    default=1,
    help="Images per prompt; each has the next seed.",
)
@click.option(
    "--out", type=PATH_TYPE, default="generated", show_default=True, help="Folder for the images."
)
def command(
    texts: tuple[str, ...],
    negative_prompt: str,
    lora: Path | None,
    strength: str,
    config: Path | None,
    steps: int,
    guidance: float,
    seed: int,
    size: str | None,
    count: int,
    out: Path,
    **model: str | None,
) -> None:
    """Generate images with the base model or a LoRA, and print their paths.

    No file is overwritten.
    """
    flags = {name: value for name, value in model.items() if value}
    found, runs = None, []
    if lora is not None and (tuned := find_finished_transformer(lora)):
        flags.setdefault("pretrained_transformer_model_name_or_path", str(tuned))
        runs = [lora.resolve()]
    elif lora is not None:
        found = find_lora_file(lora)
        runs = [*found.resolve().parents[:3]]
    options = resolve_model_options(config, runs, flags)
    size = size or DEFAULT_SIZE.get(options.model_flavour, "1024")
    parse_sizes(size, DataOptions(), 1, "--size")
    prompts = tuple(
        Prompt(safe_file_name(text) or "image", text, negative_prompt) for text in texts
    )
    request = GenerationRequest(
        prompts,
        options,
        found,
        _parse_strengths(strength, found),
        steps,
        guidance,
        seed,
        size,
        count,
        out,
    )
    with closing(TerminalSink(sys.stderr)) as shown:
        paths = generate_images(request, shown)
    for path in paths:
        click.echo(path)


def find_finished_transformer(given: Path) -> Path | None:
    """Return the transformer in the folder of a full-rank run, or None."""
    folder = given.resolve() / "transformer"
    return (
        folder if (folder / "config.json").is_file() and not (given / LORA_FILE).exists() else None
    )


def find_lora_file(given: Path) -> Path:
    """Return the LoRA file of a path: the file itself, or that of a checkpoint or a run.

    A run gives its final LoRA, else that of its newest checkpoint.
    """
    if given.is_file():
        return given
    if not given.is_dir():
        raise ConfigError([Problem(str(given), "no such file or folder")])
    checkpoints = [
        (int(match[1]), folder)
        for folder in given.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    ]
    for folder in (given, *(folder for _, folder in sorted(checkpoints, reverse=True))):
        if (folder / LORA_FILE).is_file():
            return folder / LORA_FILE
    files = sorted(given.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    what = (
        f"holds {len(files)} .safetensors files; name one of them"
        if files
        else f"holds no {LORA_FILE}; for a full transformer use "
        "--pretrained_transformer_model_name_or_path"
    )
    raise ConfigError([Problem(str(given), what)])


def _parse_strengths(text: str, lora: Path | None) -> tuple[float, ...]:
    try:
        strengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        strengths = (float("nan"),)
    if not all(-10 <= strength <= 10 for strength in strengths):
        what = (
            f"{text!r} is not a number from -10 to 10, nor a comma-separated list of such numbers"
        )
        raise ConfigError([Problem("--strength", what)])
    if lora is None and strengths != (1.0,):
        raise ConfigError([Problem("--strength", "needs --lora: it is the strength of a LoRA")])
    return strengths


def resolve_model_options(
    config: Path | None, runs: list[Path], flags: dict[str, str]
) -> ModelOptions:
    """Return the model options: flags over --config, else over the run that wrote the weights.

    Without either, the configuration found in the working directory is used.
    """
    from simpletuner.config.documents import read_document
    from simpletuner.config.load import config_from_resolved, load_config

    for run in runs if config is None else ():
        if (run / "events.jsonl").is_file() and (run / "config.json").is_file():
            known = read_document(run / "config.json", str(run / "config.json")).value
            if "model_flavour" in flags:  # the run's own base would hide the flavour asked for
                known = {
                    name: value
                    for name, value in known.items()
                    if not name.startswith("pretrained_")
                }
            return config_from_resolved({**known, **flags}).model
    return load_config(tuple(flags.items()), config, needs_data=False).config.model


def generate_images(request: GenerationRequest, emit: Emit) -> list[Path]:
    """Generate and save all images; return the paths in order of strength, size, prompt and seed.

    Text encoder, transformer and VAE are in memory one after the other, never together.
    """
    from simpletuner.adapters.lora_io import read_summary as describe_lora
    from simpletuner.models.registry import get_family as family_named
    from simpletuner.training.device import select_device
    from simpletuner.validation.validation_images import (
        GenerationSettings,
        image_metadata,
        pixels_to_image,
        save_png,
    )

    family = family_named(request.model.model_family)
    names = family.lora_conventions.names
    if request.lora_path is not None:  # reports a file that is not a LoRA before anything is loaded
        emit(NoticeIssued(f"{request.lora_path.name}: {describe_lora(request.lora_path, names)}"))
    source = family.locate_files(request.model, emit)
    device = select_device(request.model)
    sizes, notes = parse_sizes(
        request.size, DataOptions(), family.read_constants(source).alignment_px, "--size"
    )
    for note in notes:
        emit(NoticeIssued(note))
    texts = prompt_texts(request.prompts, request.guidance)
    emit(NoticeIssued(f"encoding {len(texts)} text{'s' * (len(texts) > 1)}"))
    encoded = family.load_text_encoder(source, request.model, device.device, emit).encode(texts)
    gc.collect()  # a reference cycle may keep the network; the next one needs its memory
    wanted = make_image_specs(request.prompts, sizes, request.count, request.seed)
    drawn = _generate_latents(
        request, family, source, device, dict(zip(texts, encoded, strict=True)), wanted, emit
    )
    gc.collect()
    vae = family.load_vae(source, request.model, device.device)
    paths = []
    for strength, spec, latents in drawn:
        added = {}
        if tuned := request.model.pretrained_transformer_model_name_or_path:
            added = {"transformer": "/".join(Path(tuned).parts[-2:])}
        if request.lora_path is not None:
            name = "/".join(request.lora_path.resolve().parts[-2:])
            added.update({"lora": name, "strength": f"{strength:g}"})
        settings = GenerationSettings(
            request.steps, request.guidance, " x ".join([source.name, *added.values()])
        )
        path = _unused_path(request.output_dir, spec)
        save_png(
            pixels_to_image(vae.decode(latents)), path, image_metadata(spec, settings, **added)
        )
        paths.append(path)
    return paths


def _generate_latents(
    request: GenerationRequest,
    family: ModelFamily,
    source: ModelFiles,
    device: ComputeDevice,
    embeddings: dict[str, TextEmbedding],
    wanted: tuple[ImageSpec, ...],
    emit: Emit,
) -> list[tuple[float, ImageSpec, Tensor]]:
    """Generate the latents of every image at every strength."""
    import torch

    from simpletuner.adapters.attachment import set_strength
    from simpletuner.adapters.lora_io import load_adapter
    from simpletuner.models.block_executor import block_memory_policy
    from simpletuner.validation.inference import Inference
    from simpletuner.validation.sampler import generate_latents

    emit(NoticeIssued(f"loading {source.name}"))
    at = torch.device("cpu") if request.model.musubi_blocks_to_swap else device.device
    transformer = family.load_transformer(source, at, device.weights_dtype, request.model, emit)
    dtype = device.autocast_dtype or device.weights_dtype
    inference = Inference(
        family, family.read_constants(source), device.device, dtype, device.autocast
    )
    if request.lora_path is not None:
        load_adapter(
            transformer, request.lora_path, family.lora_conventions.names, request.strengths[0]
        )
    memory = block_memory_policy(request.model, family.block_count(transformer))
    family.place_blocks(transformer, memory, device.device)
    family.compile_blocks(transformer, request.model)
    again = partial(generate_latents, inference, transformer, wanted, embeddings.__getitem__)
    drawn = []
    with StageReporter(emit, "generate", len(wanted) * len(request.strengths), "images") as stage:
        for strength in request.strengths:
            if request.lora_path is not None:
                set_strength(transformer, strength)
            for spec, latents in again(steps=request.steps, guidance=request.guidance):
                drawn.append((strength, spec, latents))
                stage.advance()
    return drawn


def _unused_path(folder: Path, spec: ImageSpec) -> Path:
    """Return <prompt>-<seed>-<W>x<H>.png, with the first number appended that gives a new file."""
    stem = f"{spec.prompt.id}-{spec.seed}-{spec.size_px[0]}x{spec.size_px[1]}"
    path, number = folder / f"{stem}.png", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path
