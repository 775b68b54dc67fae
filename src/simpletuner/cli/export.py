"""simpletuner export: convert, average or check LoRAs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simpletuner import __version__
from simpletuner.cli.averaging import (
    EQUAL,
    are_of_one_run,
    average_full_weights,
    average_loras,
    parse_weights,
)
from simpletuner.cli.merge import parse_weighted_lora
from simpletuner.cli.trained_weights import find_lora_file
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError, ModelError, Problem

if TYPE_CHECKING:
    from simpletuner.adapters.average_deltas import WeightedDeltas
    from simpletuner.adapters.compatibility_check import ProgramCompatibility
    from simpletuner.adapters.deltas import Delta
    from simpletuner.adapters.lora_file import LoraFile
    from simpletuner.adapters.module_names import ModuleNames

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
@click.argument("sources", nargs=-1, required=True, type=PATH_TYPE)
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
    "--average",
    is_flag=False,
    flag_value=EQUAL,
    metavar="[1,2,1]",
    help="Average the sources, equally or with these weights; write it after the sources.",
)
@click.option(
    "--output",
    type=PATH_TYPE,
    help="The new file.  [default: in the folder of SOURCE, with the format in its name]",
)
def command(
    sources: tuple[Path, ...],
    checking: bool,
    as_json: bool,
    layout: str | None,
    rank: int | None,
    dtype: str,
    strength: float,
    others: tuple[str, ...],
    average: str | None,
    output: Path | None,
) -> None:
    """Convert SOURCES, a LoRA file of any layout or a run, for diffusers, kohya or ComfyUI.

    With --average the sources are LoRA files, checkpoints or runs, and their mean is written: also
    that of full-rank trainings, as a transformer folder. No file is overwritten, and nothing is
    written that a program would not apply as it was trained.
    """
    if average is not None:
        if checking or others or strength != 1:
            raise ConfigError(
                [Problem("--average", "is used without --check, --with and --strength")]
            )
        average_sources(sources, average, layout, rank, dtype, output)
        return
    if len(sources) > 1:
        raise ConfigError([Problem("export", "several sources are averaged: add --average")])
    source = find_lora_file(sources[0])
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
    check_output(output)
    export_lora(added, layout, rank, dtype, output)
    click.echo(output)


def check_output(output: Path, may_be_folder: bool = False) -> None:
    """Raise ConfigError for an output that exists or cannot be written."""
    if output.exists():
        raise ConfigError(
            [Problem("--output", f"{output} exists and is not overwritten; choose another")]
        )
    if (output.suffix != ".safetensors" and not may_be_folder) or not output.parent.is_dir():
        raise ConfigError(
            [Problem("--output", f"{output} is not a .safetensors file in an existing folder")]
        )


def average_sources(
    sources: Sequence[Path],
    average: str,
    layout: str | None,
    rank: int | None,
    dtype: str,
    output: Path | None,
) -> None:
    """Average LoRAs into a file, or full-rank weights into a transformer folder."""
    if len(sources) < 2 or output is None:
        raise ConfigError([Problem("--average", "needs two sources or more, and --output")])
    for source in sources:
        if not source.exists():
            raise ConfigError([Problem(str(source), "no such file or folder")])
    parts = list(zip(sources, parse_weights(average, len(sources)), strict=True))
    check_output(output, may_be_folder=True)
    if not average_full_weights(parts, output):
        check_output(output)
        files = [(find_lora_file(source), weight) for source, weight in parts]
        export_lora(files, layout, rank, dtype, output, averaged=True)
    click.echo(output)


def export_lora(
    added: list[tuple[Path, float]],
    layout: str | None,
    rank: int | None,
    dtype: str,
    output: Path,
    averaged: bool = False,
) -> None:
    """Add up the deltas, or average the files; reduce the rank if asked to, and write the file.

    layout: None is the default layout of the kind of adapter.
    """
    import torch

    from simpletuner.adapters import lora_io
    from simpletuner.adapters.layouts import LAYOUTS
    from simpletuner.adapters.lora_file import read_lora_file
    from simpletuner.models.registry import get_family

    conventions = get_family(ModelOptions().model_family).lora_conventions
    read = [(read_lora_file(path, conventions.names), weight) for path, weight in added]
    for file, weight in read:
        click.echo(
            f"{file.path.name}: {file.to_deltas_and_summary()[1]}; strength {weight:g}", err=True
        )
    layout = layout or lora_io.default_layout("LoKr" if read[0][0].is_lycoris else "LoRA")
    fused_names = conventions.names if LAYOUTS[layout].uses_native_names else None
    parts = [(file.to_deltas(), weight) for file, weight in read]
    if averaged:
        one_run = are_of_one_run([path for path, _ in added])
        deltas, described = average_loras(parts, one_run, rank, fused_names)
    else:
        deltas, described = add_up(parts, rank, fused_names)
    if described:
        click.echo(described, err=True)
    metadata = {
        key: text
        for key, text in read[0][0].metadata.items()
        if not key.startswith(STALE_METADATA_PREFIXES)
    }
    metadata["software"] = f"simpletuner {__version__}"
    torch_dtype = getattr(torch, DTYPES[dtype])
    lora_io.save_deltas(deltas, output, conventions, layout, torch_dtype, metadata)
    print_compatibility(output, as_json=False, err=True)


def add_up(
    parts: WeightedDeltas, rank: int | None, fused_names: ModuleNames | None
) -> tuple[dict[str, Delta], str]:
    """Return the sum of the deltas, reduced to a rank, and a line about the error."""
    from simpletuner.adapters import merge_deltas

    deltas = merge_deltas.sum_weighted_loras(parts)
    if rank is None:
        return deltas, ""
    deltas, error = merge_deltas.truncate_rank(deltas, rank, fused_names)
    return deltas, f"rank {rank}: the delta differs by {error:.2%}"


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
