"""simpletuner merge: merge LoRAs into the base model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click

from simpletuner import __version__
from simpletuner.cli.generate import FLAVOURS
from simpletuner.cli.trained_weights import find_lora_file, resolve_model_options
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError, Problem
from simpletuner.events.terminal_sink import TerminalSink

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn"}
SAFETENSORS_SUFFIX = ".safetensors"


@click.command(
    "merge", context_settings={"token_normalize_func": lambda name: name.replace("-", "_")}
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[=WEIGHT]",
    help="LoRA to merge; may be repeated or left out.",
)
@click.option(
    "--base",
    help="Base: flavour, hub id, folder, file or run.  [default: that of the first LoRA's run]",
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="New folder or file."
)
@click.option(
    "--format", "layout", type=click.Choice(["diffusers", "native"]), help="[default: by --output]"
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="bf16",
    show_default=True,
    help="Dtype of the weights.",
)
def command(
    loras: tuple[str, ...], base: str | None, output: Path, layout: str | None, dtype: str
) -> None:
    """Write the base model with LoRAs merged into it.

    The result is a diffusers folder, or one native .safetensors file for ComfyUI. LoRAs of any
    layout are accepted, and DoRA too; the delta of each is relative to the original base. fp8 is
    written as scaled fp8, for ComfyUI. No file is overwritten.
    """
    added = [parse_weighted_lora(text) for text in loras]
    layout = layout or ("native" if output.suffix == SAFETENSORS_SUFFIX else "diffusers")
    problems = []
    if (layout == "native") != (output.suffix == SAFETENSORS_SUFFIX):
        problems.append(
            Problem(
                "--output", f"{output}: native is one {SAFETENSORS_SUFFIX} file, diffusers a folder"
            )
        )
    if layout == "diffusers" and dtype == "fp8":
        problems.append(
            Problem("--dtype", "diffusers cannot read scaled fp8; use --format native or bf16")
        )
    if not output.parent.is_dir():
        problems.append(Problem("--output", f"{output.parent} does not exist"))
    if not added and base is None:
        problems.append(Problem("--lora", "name a LoRA to merge, or a --base to convert"))
    if problems:
        raise ConfigError(problems)
    merge_loras(added, _resolve_base_options(base, added), layout == "native", dtype, output)
    click.echo(output)


def parse_weighted_lora(text: str, option: str = "--lora") -> tuple[Path, float]:
    """Parse FILE=WEIGHT or FILE, where FILE may be a checkpoint or a run."""
    name, mark, number = text.rpartition("=")
    if not mark or Path(text).exists():
        return find_lora_file(Path(text)), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(
            [Problem(option, f"{text!r} is not FILE=WEIGHT, such as style{SAFETENSORS_SUFFIX}=0.5")]
        )
    return find_lora_file(Path(name)), weight


def _resolve_base_options(base: str | None, added: list[tuple[Path, float]]) -> ModelOptions:
    """Return the model options of the base.

    Only the transformer of a named base is needed; the other parts are then those of the bundled
    model.
    """
    from simpletuner.models.registry import get_family

    if base is None:
        return resolve_model_options(None, [*added[0][0].resolve().parents[:3]], {})
    if base == "nano":
        return ModelOptions(model_flavour="nano")
    hub_ids = get_family(ModelOptions().model_family).flavours
    name = hub_ids[base] if base in FLAVOURS else base
    return ModelOptions(model_flavour="nano", pretrained_transformer_model_name_or_path=name)


def merge_loras(
    added: list[tuple[Path, float]], options: ModelOptions, native: bool, dtype: str, output: Path
) -> None:
    """Merge the LoRAs into the transformer and write it, with metadata about its parts."""
    import torch

    from simpletuner.adapters.lora_file import read_lora_file
    from simpletuner.models.registry import get_family as family_named
    from simpletuner.models.weights.merge_loras import MergeOutput
    from simpletuner.training.model_metadata import public_name

    shown = TerminalSink(sys.stderr)
    family = family_named(options.model_family)
    names = family.lora_conventions.names
    read = [(read_lora_file(path, names), weight) for path, weight in added]
    for file, weight in read:
        click.echo(
            f"{file.path.name}: {file.to_deltas_and_summary()[1]}; weight {weight:g}", err=True
        )
    source = family.locate_files(options, shown)
    base = public_name(options.pretrained_transformer_model_name_or_path or source.name)
    parts = [f"{public_name(str(path.absolute()))} x {weight:g}" for path, weight in added]
    metadata = {
        "software": f"simpletuner {__version__}",
        "base_model": base,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": options.model_family,
        "modelspec.implementation": "diffusers",
        "modelspec.title": output.stem,
        "modelspec.merged_from": ", ".join([base, *parts]),
    }
    try:
        target = MergeOutput(output, native, getattr(torch, DTYPES[dtype]))
        loras = [(file.to_deltas(), weight) for file, weight in read]
        family.merge_loras(source, loras, target, metadata, shown)
    finally:
        shown.close()
    if uses_bundled_transformer(options):
        click.echo(
            "the bundled model has sizes that other programs do not support: this file is for "
            "this program alone",
            err=True,
        )


def uses_bundled_transformer(options: ModelOptions) -> bool:
    """Return whether the base is the small bundled model."""
    return options.model_flavour == "nano" and not (
        options.pretrained_model_name_or_path or options.pretrained_transformer_model_name_or_path
    )
