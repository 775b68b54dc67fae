"""simpletuner generate: images from a base model and optionally a LoRA at any strength."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

from simpletuner.cli.generation import GenerationRequest, generate_images
from simpletuner.cli.generation_requests import serve_requests
from simpletuner.cli.kept_network import KeptNetwork
from simpletuner.cli.trained_weights import (
    find_finished_transformer,
    find_lora_file,
    resolve_model_options,
)
from simpletuner.config.schema import DataOptions, ModelOptions
from simpletuner.data.start_image import (
    StartImageRequest,
    check_request,
)
from simpletuner.errors import ConfigError, Problem
from simpletuner.events.event_types import Emit
from simpletuner.events.terminal_sink import TerminalSink
from simpletuner.validation.prompts import (
    Prompt,
    parse_sizes,
    safe_file_name,
)

FLAVOURS = get_args(ModelOptions.model_fields["model_flavour"].annotation)
PRECISIONS = get_args(ModelOptions.model_fields["base_model_precision"].annotation)
DEFAULT_SIZE = {"nano": "128"}
PATH_TYPE = click.Path(path_type=Path)


@click.command(
    "generate", context_settings={"token_normalize_func": lambda name: name.replace("-", "_")}
)
@click.option("--prompt", "texts", multiple=True, help="Prompt; may be repeated.")
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
    "--image",
    type=PATH_TYPE,
    help="Start from this image. --size: a square is an area in which it keeps its aspect ratio; "
    "it is cropped to any other size.",
)
@click.option(
    "--denoise",
    type=click.FloatRange(0, 1, min_open=True),
    help="How much of --image is replaced: the noise level at which sampling starts. 1 ignores the "
    "image.  [default: 0.5]",
)
@click.option(
    "--mask",
    type=PATH_TYPE,
    help="Keep the part of --image that is white in this image, and generate the rest.",
)
@click.option(
    "--invert_mask", is_flag=True, help="Generate what is white in --mask, and keep the rest."
)
@click.option(
    "--preview",
    is_flag=True,
    help="While sampling, keep a rough preview of the images in preview.jpg in --out.",
)
@click.option(
    "--out", type=PATH_TYPE, default="generated", show_default=True, help="Folder for the images."
)
@click.option("--requests", type=PATH_TYPE, hidden=True)
def command(requests: Path | None, **given: Any) -> None:
    """Generate images with the base model or a LoRA, and print their paths.

    No file is overwritten.
    """
    with closing(TerminalSink(sys.stderr)) as shown:
        if requests is not None:  # of the pages: see generation_requests.py
            serve_requests(requests, partial(_generate_requested, KeptNetwork(), shown))
            return
        request = _read_request(**given)
        for path in generate_images(request, shown):
            click.echo(path)


def _generate_requested(network: KeptNetwork, emit: Emit, words: Sequence[str]) -> None:
    """Generate what the words of a command line ask for. Raises click.ClickException."""
    context = command.make_context("generate", list(words))
    given = {name: value for name, value in context.params.items() if name != "requests"}
    generate_images(_read_request(**given), emit, network)


def _read_request(
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
    image: Path | None,
    denoise: float | None,
    mask: Path | None,
    invert_mask: bool,
    preview: bool,
    out: Path,
    **model: str | None,
) -> GenerationRequest:
    """Return the request, checked as far as possible without loading anything."""
    if not texts:
        raise click.UsageError("Missing option '--prompt'.")
    flags = {name: value for name, value in model.items() if value}
    adapter_file, runs = None, []
    if lora is not None and (tuned := find_finished_transformer(lora)):
        flags.setdefault("pretrained_transformer_model_name_or_path", str(tuned))
        runs = [lora.resolve()]
    elif lora is not None:
        adapter_file = find_lora_file(lora)
        runs = [*adapter_file.resolve().parents[:3]]
    options = resolve_model_options(config, runs, flags)
    start = _parse_start(image, denoise, mask, invert_mask)
    size = size or DEFAULT_SIZE.get(options.model_flavour, "1024")
    parse_sizes(size, DataOptions(), 1, "--size")
    prompts = tuple(
        Prompt(safe_file_name(text) or "image", text, negative_prompt) for text in texts
    )
    return GenerationRequest(
        prompts,
        options,
        adapter_file,
        _parse_strengths(strength, adapter_file),
        steps,
        guidance,
        seed,
        size,
        count,
        out,
        start,
        preview,
    )


def _parse_start(
    image: Path | None, denoise: float | None, mask: Path | None, invert_mask: bool
) -> StartImageRequest | None:
    """Return what --image and its companions ask for, after the headers of both files were read."""
    if image is None:
        given = {"--denoise": denoise is not None, "--mask": mask is not None}
        for option in (name for name, is_given in given.items() if is_given):
            raise ConfigError([Problem(option, "needs --image: the image to start from")])
    if mask is None and invert_mask:
        raise ConfigError([Problem("--invert_mask", "needs --mask: the mask that is inverted")])
    if image is None:
        return None
    request = StartImageRequest(image, 0.5 if denoise is None else denoise, mask, invert_mask)
    check_request(request, "--image", "--mask")
    return request


def _parse_strengths(text: str, lora: Path | None) -> tuple[float, ...]:
    try:
        strengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        strengths = (float("nan"),)
    if not all(-10 <= strength <= 10 for strength in strengths):
        problem = (
            f"{text!r} is not a number from -10 to 10, nor a comma-separated list of such numbers"
        )
        raise ConfigError([Problem("--strength", problem)])
    if lora is None and strengths != (1.0,):
        raise ConfigError([Problem("--strength", "needs --lora: it is the strength of a LoRA")])
    return strengths
