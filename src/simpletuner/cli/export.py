"""simpletuner export: convert a LoRA for another program, or check its compatibility."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simpletuner import __version__
from simpletuner.cli.merge import parse_weighted_lora
from simpletuner.cli.trained_weights import find_lora_file
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError, ModelError, Problem

if TYPE_CHECKING:
    from simpletuner.adapters.compatibility_check import ProgramCompatibility
    from simpletuner.adapters.lora_file import LoraFile

PATH_TYPE = click.Path(path_type=Path)
FORMATS = ("diffusers", "kohya", "comfyui", "lycoris")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Metadata about the numbers of a file is not valid for the converted one.
STALE_METADATA_PREFIXES = (
    "format",
    "lora_adapter_metadata",
    "rank",
    "alpha",
    "ss_network_",
    "sshs_",
    "modelspec.hash",
)


@click.command(
    "export", context_settings={"token_normalize_func": lambda name: name.replace("-", "_")}
)
@click.argument("source", type=PATH_TYPE)
@click.option(
    "--check", "checking", is_flag=True, help="Write nothing; report how each program loads it."
)
@click.option("--json", "as_json", is_flag=True, help="With --check: print JSON.")
@click.option("--format", "layout", type=click.Choice(FORMATS), help="Layout to write.")
@click.option(
    "--rank",
    type=click.IntRange(1, 8192),
    help="Reduce to this rank; the approximation error is reported.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="fp32",
    show_default=True,
    help="Dtype of the weights.",
)
@click.option(
    "--strength",
    type=float,
    default=1.0,
    show_default=True,
    help="Strength, multiplied into the weights.",
)
@click.option(
    "--with",
    "others",
    multiple=True,
    metavar="FILE[=WEIGHT]",
    help="Add another LoRA; may be repeated.",
)
@click.option(
    "--output",
    type=PATH_TYPE,
    help="The new file.  [default: in the folder of SOURCE, with the format in its name]",
)
def command(
    source: Path,
    checking: bool,
    as_json: bool,
    layout: str | None,
    rank: int | None,
    dtype: str,
    strength: float,
    others: tuple[str, ...],
    output: Path | None,
) -> None:
    """Convert SOURCE, a LoRA file of any layout or a run, for diffusers, kohya or ComfyUI.

    No file is overwritten, and nothing is written that a program would not apply as it was trained.
    """
    source = find_lora_file(source)
    if checking == (layout is not None) or (as_json and not checking):
        choices = "either --format (to write a file) or --check (optionally with --json)"
        raise ConfigError([Problem("export", f"needs {choices}")])
    if checking or layout is None:
        print_compatibility(source, as_json)
        return
    added = [(source, strength), *(parse_weighted_lora(text, "--with") for text in others)]
    if not all(math.isfinite(weight) and weight for _, weight in added):
        raise ConfigError(
            [Problem("--strength", "strengths and weights must be finite numbers other than 0")]
        )
    output = output or source.with_name(f"{source.stem}.{layout}.safetensors")
    if output.exists():
        raise ConfigError(
            [Problem("--output", f"{output} exists and is not overwritten; choose another")]
        )
    if output.suffix != ".safetensors" or not output.parent.is_dir():
        raise ConfigError(
            [Problem("--output", f"{output} is not a .safetensors file in an existing folder")]
        )
    export_lora(added, layout, rank, dtype, output)
    click.echo(output)


def export_lora(
    added: list[tuple[Path, float]], layout: str, rank: int | None, dtype: str, output: Path
) -> None:
    """Add up the deltas, reduce their rank if asked to, and write the file."""
    import torch

    from simpletuner.adapters import lora_io, merge_deltas
    from simpletuner.adapters.layouts import LAYOUTS
    from simpletuner.adapters.lora_file import read_lora_file
    from simpletuner.models.registry import get_family

    conventions = get_family(ModelOptions().model_family).lora_conventions
    read = [(read_lora_file(path, conventions.names), weight) for path, weight in added]
    for file, weight in read:
        click.echo(
            f"{file.path.name}: {file.to_deltas_and_summary()[1]}; strength {weight:g}", err=True
        )
    deltas = merge_deltas.sum_weighted_loras([(file.to_deltas(), weight) for file, weight in read])
    if rank is not None:
        fused_names = conventions.names if LAYOUTS[layout].uses_native_names else None
        deltas, error = merge_deltas.truncate_rank(deltas, rank, fused_names)
        click.echo(f"rank {rank}: the delta differs by {error:.2%}", err=True)
    metadata = {
        key: text
        for key, text in read[0][0].metadata.items()
        if not key.startswith(STALE_METADATA_PREFIXES)
    }
    metadata["software"] = f"simpletuner {__version__}"
    torch_dtype = getattr(torch, DTYPES[dtype])
    lora_io.save_deltas(deltas, output, conventions, layout, torch_dtype, metadata)
    print_compatibility(output, as_json=False, err=True)


def print_compatibility(path: Path, as_json: bool, err: bool = False) -> None:
    """Print how every program loads the file."""
    from simpletuner.adapters.compatibility_check import check_compatibility
    from simpletuner.adapters.key_survey import predict_from_keys, survey_keys
    from simpletuner.models.registry import get_family

    conventions = get_family(ModelOptions().model_family).lora_conventions
    try:
        file, verdicts = check_compatibility(path, conventions)
    except ModelError as error:
        survey = survey_keys(path)
        verdicts = predict_from_keys(survey, conventions)
        reason = f"not read by this program: {error}"
        summary: dict[str, object] = {"file": str(path), "keys": survey.keys, "unread": str(error)}
        heading = f"{path.name}: {survey}\n  {reason}"
    else:
        summary = _summary_fields(file)
        heading = f"{file.path.name}: {file.to_deltas_and_summary()[1]}"
        if note := _width_note(file, conventions.width):
            summary["note"] = note
            heading = f"{heading}\n  {note}"
    text = _compatibility_json(summary, verdicts) if as_json else _text(heading, verdicts)
    click.echo(text, err=err)


def _width_note(file: LoraFile, width: int | None) -> str:
    """Say that the file is not of a published model, which is all that other programs load."""
    if width is None or any(width in delta.shape for delta in file.to_deltas().values()):
        return ""
    return (
        f"it was trained on a model whose width is not {width}, such as the bundled one: only this "
        "program can use it; the lines below show how the names would be treated"
    )


def _summary_fields(file: LoraFile) -> dict[str, object]:
    summary = asdict(file.to_deltas_and_summary()[1])
    fields = {name: summary[name] for name in ("layout", "kind", "ranks", "alphas", "parameters")}
    return {"file": str(file.path), **fields, "modules": len(summary["modules"])}


def _compatibility_json(
    summary: dict[str, object], verdicts: tuple[ProgramCompatibility, ...]
) -> str:
    return json.dumps({**summary, "programs": [asdict(verdict) for verdict in verdicts]}, indent=2)


def _text(heading: str, verdicts: tuple[ProgramCompatibility, ...]) -> str:
    lines = [heading]
    for verdict in verdicts:
        strength = (
            f"strength {verdict.strength:g}: "
            if verdict.outcome == "wrong strength" and verdict.strength
            else ""
        )
        loaded = f"{verdict.modules} of {verdict.of}"
        program = f"{verdict.program} {verdict.version}"
        line = f"  {program:<28}  {verdict.outcome:<14}  {loaded}  {strength}{verdict.why}"
        lines.append(line.rstrip())
    return "\n".join(lines)
