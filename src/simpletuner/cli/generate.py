"""simpletuner generate: pictures from a base model and, if one is given, a LoRA at any strength."""

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
from simpletuner.events.progress import Stage
from simpletuner.events.terminal import Terminal
from simpletuner.events.types import Emit, Noted
from simpletuner.validation.prompts import Picture, Prompt, captions, file_safe, pictures, read_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.models.family import ModelFamily, Source
    from simpletuner.training.device import Device

LORA_FILE = "pytorch_lora_weights.safetensors"
FLAVOURS = get_args(ModelOptions.model_fields["model_flavour"].annotation)
PRECISIONS = get_args(ModelOptions.model_fields["base_model_precision"].annotation)
DEFAULT_SIZE = {"nano": "128"}
FILE = click.Path(path_type=Path)


@dataclass(frozen=True)
class Request:
    """What is asked for, checked as far as that goes without loading anything."""

    prompts: tuple[Prompt, ...]
    model: ModelOptions
    lora: Path | None
    strengths: tuple[float, ...]
    steps: int
    guidance: float
    seed: int
    size: str
    count: int
    out: Path


@click.command("generate", context_settings={"token_normalize_func": lambda name: name.replace("-", "_")})
@click.option("--prompt", "texts", multiple=True, required=True, help="What to draw; may be repeated.")
@click.option("--negative_prompt", default="", help="What guidance above 1 steers away from.")
@click.option("--lora", type=FILE, help="A LoRA file, a checkpoint or a run folder (of any training).")
@click.option("--strength", default="1.0", show_default=True, help="Of the LoRA; a comma list draws each.")
@click.option("--model_flavour", type=click.Choice(FLAVOURS), help="Default: the LoRA's run's, else base.")
@click.option("--pretrained_model_name_or_path", help="Another base: a folder, hub id or single file.")
@click.option("--pretrained_transformer_model_name_or_path", help="Another transformer: a tuned one.")
@click.option("--pretrained_t5_model_name_or_path", help="Another T5: a folder, a hub id or a single file.")
@click.option("--pretrained_vae_model_name_or_path", help="Another VAE, alike.")
@click.option("--base_model_precision", type=click.Choice(PRECISIONS), help="Default: the LoRA's run's.")
@click.option("--config", type=FILE, help="Take the model options from this file.")
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True, help="Sampling steps.")
@click.option("--guidance", type=click.FloatRange(0, 30), default=1.0, show_default=True, help="1: one pass.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=42, show_default=True, help="Of the first.")
@click.option("--size", help="512, 512x768 or a comma list, pixels.  [default: 1024; nano 128]")
@click.option("--count", type=click.IntRange(1, 1000), default=1, help="Pictures per prompt, seeds count up.")
@click.option("--out", type=FILE, default="generated", show_default=True, help="Folder for the pictures.")
def command(
    texts: tuple[str, ...], negative_prompt: str, lora: Path | None, strength: str, config: Path | None,
    steps: int, guidance: float, seed: int, size: str | None, count: int, out: Path, **model: str | None,
) -> None:  # fmt: skip
    """Draw pictures with the base model or a LoRA. Prints the path of each; nothing is overwritten."""
    flags = {name: value for name, value in model.items() if value}
    found, runs = None, []
    if lora is not None and (tuned := finished_transformer(lora)):
        flags.setdefault("pretrained_transformer_model_name_or_path", str(tuned))
        runs = [lora.resolve()]
    elif lora is not None:
        found = find_lora(lora)
        runs = [*found.resolve().parents[:3]]
    options = model_options(config, runs, flags)
    size = size or DEFAULT_SIZE.get(options.model_flavour, "1024")
    read_sizes(size, DataOptions(), 1, "--size")
    prompts = tuple(Prompt(file_safe(text) or "picture", text, negative_prompt) for text in texts)
    request = Request(
        prompts, options, found, _strengths(strength, found), steps, guidance, seed, size, count, out
    )
    with closing(Terminal(sys.stderr)) as shown:
        paths = generate(request, shown)
    for path in paths:
        click.echo(path)


def finished_transformer(given: Path) -> Path | None:
    """What a run at full rank leaves in its folder."""
    folder = given.resolve() / "transformer"
    return folder if (folder / "config.json").is_file() and not (given / LORA_FILE).exists() else None


def find_lora(given: Path) -> Path:
    """The LoRA file itself, of a checkpoint, or of a run: the finished one, else its newest checkpoint's."""
    if given.is_file():
        return given
    if not given.is_dir():
        raise ConfigError([Problem(str(given), "is neither a file nor a folder")])
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
        else f"holds no {LORA_FILE}; --pretrained_transformer_model_name_or_path takes full transformers"
    )
    raise ConfigError([Problem(str(given), what)])


def _strengths(text: str, lora: Path | None) -> tuple[float, ...]:
    try:
        strengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        strengths = (float("nan"),)
    if not all(-10 <= strength <= 10 for strength in strengths):
        what = f"{text!r} is not a number from -10 to 10 or a comma list of them"
        raise ConfigError([Problem("--strength", what)])
    if lora is None and strengths != (1.0,):
        raise ConfigError([Problem("--strength", "is the strength of a LoRA; give --lora too")])
    return strengths


def model_options(config: Path | None, runs: list[Path], flags: dict[str, str]) -> ModelOptions:
    """Flags over --config, else over the run that made the weights, else over the one found here."""
    from simpletuner.config.files import read_document
    from simpletuner.config.load import from_resolved, load

    for run in runs if config is None else ():
        if (run / "events.jsonl").is_file() and (run / "config.json").is_file():
            known = read_document(run / "config.json", str(run / "config.json")).value
            if "model_flavour" in flags:  # the run's own base would hide the flavour asked for
                known = {name: value for name, value in known.items() if not name.startswith("pretrained_")}
            return from_resolved({**known, **flags}).model
    return load(tuple(flags.items()), config, needs_data=False).run.model


def generate(request: Request, emit: Emit) -> list[Path]:
    """Draw and write everything; the paths in the order of strengths, then sizes, prompts and seeds.

    The text encoder, the transformer and the VAE are in memory one after the other, never together.
    """
    from simpletuner.adapters.files import describe as describe_lora
    from simpletuner.models.registry import family as family_named
    from simpletuner.training.device import choose
    from simpletuner.validation.images import Settings, describe, save_png, to_image

    family = family_named(request.model.model_family)
    if request.lora is not None:  # what is none is told before anything is loaded
        emit(Noted(f"{request.lora.name}: {describe_lora(request.lora)}"))
    source = family.locate(request.model, emit)
    device = choose(request.model)
    sizes, notes = read_sizes(request.size, DataOptions(), family.facts(source).alignment_px, "--size")
    for note in notes:
        emit(Noted(note))
    texts = captions(request.prompts, request.guidance)
    emit(Noted(f"encoding {len(texts)} text{'s' * (len(texts) > 1)}"))
    encoded = family.load_text_encoder(source, request.model, device.device, emit).encode(texts)
    gc.collect()  # a network may be held by a cycle; the next one needs its memory
    wanted = pictures(request.prompts, sizes, request.count, request.seed)
    drawn = _draw(request, family, source, device, dict(zip(texts, encoded, strict=True)), wanted, emit)
    gc.collect()
    vae = family.load_vae(source, request.model, device.device)
    paths = []
    for strength, picture, latents in drawn:
        added = {}
        if tuned := request.model.pretrained_transformer_model_name_or_path:
            added = {"transformer": "/".join(Path(tuned).parts[-2:])}
        if request.lora is not None:
            name = "/".join(request.lora.resolve().parts[-2:])
            added.update({"lora": name, "strength": f"{strength:g}"})
        settings = Settings(request.steps, request.guidance, " x ".join([source.name, *added.values()]))
        path = _free_path(request.out, picture)
        save_png(to_image(vae.decode(latents)), path, describe(picture, settings, **added))
        paths.append(path)
    return paths


def _draw(
    request: Request, family: ModelFamily, source: Source, device: Device, rows: dict[str, Tensor],
    wanted: tuple[Picture, ...], emit: Emit,
) -> list[tuple[float, Picture, Tensor]]:  # fmt: skip
    """Latents of every picture at every strength."""
    import torch

    from simpletuner.adapters.files import load_into
    from simpletuner.adapters.lora import set_strength
    from simpletuner.models.blocks import block_memory
    from simpletuner.validation.inference import Inference
    from simpletuner.validation.sampler import latents_of

    emit(Noted(f"loading {source.name}"))
    at = torch.device("cpu") if request.model.musubi_blocks_to_swap else device.device
    transformer = family.load_transformer(source, at, device.weights, request.model, emit)
    dtype = device.compute or device.weights
    inference = Inference(family, family.facts(source), device.device, dtype, device.autocast)
    if request.lora is not None:
        load_into(transformer, request.lora, request.strengths[0])
    memory = block_memory(request.model, family.block_count(transformer))
    family.arrange(transformer, memory, device.device)
    family.compile_blocks(transformer, request.model)
    again = partial(latents_of, inference, transformer, wanted, rows.__getitem__)
    drawn = []
    with Stage(emit, "draw", len(wanted) * len(request.strengths), "pictures") as stage:
        for strength in request.strengths:
            if request.lora is not None:
                set_strength(transformer, strength)
            for picture, latents in again(steps=request.steps, guidance=request.guidance):
                drawn.append((strength, picture, latents))
                stage.advance()
    return drawn


def _free_path(folder: Path, picture: Picture) -> Path:
    """<prompt>-<seed>-<W>x<H>.png, with the first number appended that makes it a new file."""
    stem = f"{picture.prompt.id}-{picture.seed}-{picture.size_px[0]}x{picture.size_px[1]}"
    path, number = folder / f"{stem}.png", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path
