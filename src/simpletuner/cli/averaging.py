"""The average of LoRA files, checkpoints or runs, for simpletuner export --average."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simpletuner.cli.merge import uses_bundled_transformer
from simpletuner.cli.trained_weights import find_lora_file, resolve_model_options
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import ConfigError, Problem
from simpletuner.events.terminal_sink import TerminalSink

if TYPE_CHECKING:
    from simpletuner.adapters.average_deltas import WeightedDeltas
    from simpletuner.adapters.deltas import Delta
    from simpletuner.adapters.module_names import ModuleNames

EQUAL = "equal"
RUN_FILE = "events.jsonl"


def parse_weights(text: str, count: int) -> list[float]:
    """Return `count` weights that add up to 1, from "equal" or "1,2,1". Raises ConfigError."""
    if text == EQUAL:
        return [1 / count] * count
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        weights = []
    total = sum(weights)
    if len(weights) != count or not all(math.isfinite(w) and w >= 0 for w in weights) or not total:
        raise ConfigError(
            [
                Problem(
                    "--average",
                    f"{text!r} is not a list of {count} weights from 0 on, one for each source, "
                    'such as "1,2,1"; write --average after the sources for equal weights',
                )
            ]
        )
    return [weight / total for weight in weights]


def average_full_weights(parts: Sequence[tuple[Path, float]], output: Path) -> bool:
    """Average full-rank sources into a transformer folder; return False where they are LoRAs.

    Raises ConfigError for a mixture of the two.
    """
    from simpletuner.training.average_weights import average_transformers, find_full_weights

    weights_of_sources = [
        (find_full_weights(source) if source.is_dir() else None, w) for source, w in parts
    ]
    if all(files is None for files, _ in weights_of_sources):
        return False
    named = [(files, weight) for files, weight in weights_of_sources if files is not None]
    if len(named) != len(weights_of_sources):
        raise ConfigError(
            [Problem("--average", "some sources are LoRAs and others whole transformers")]
        )
    if output.suffix == ".safetensors":
        raise ConfigError([Problem("--output", f"{output}: full-rank weights need a folder")])
    shown = TerminalSink(sys.stderr)
    try:
        count = average_transformers(named, _base_options(parts[0][0]), output, shown)
    finally:
        shown.close()
    click.echo(f"the mean of {len(named)} sources, {count} tensors, summed in float64", err=True)
    return True


def find_transformer(source: Path) -> Path | None:
    """Return the transformer folder that a path is or holds; None for a checkpoint."""
    folders = (source / "transformer", source)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _base_options(source: Path) -> ModelOptions:
    """Return the options of the base; only its transformer is needed.

    That is the source itself where it is a whole transformer, else the base of the checkpoint's
    run. The other parts are then those of the bundled model, which are never downloaded.
    """
    from simpletuner.models.registry import get_family

    whole = find_transformer(source)
    if whole is None:
        run = resolve_model_options(None, [*source.resolve().parents[:1]], {})
        if uses_bundled_transformer(run):
            return run
        given = run.pretrained_transformer_model_name_or_path or run.pretrained_model_name_or_path
        flavours = get_family(run.model_family).flavours
        base = given or flavours[run.model_flavour]
    else:
        base = str(whole)
    return ModelOptions(model_flavour="nano", pretrained_transformer_model_name_or_path=base)


def are_of_one_run(sources: Sequence[Path]) -> bool:
    """Return whether all LoRA files are in one run folder or its checkpoints."""
    runs = set()
    for source in sources:
        file = find_lora_file(source).resolve()
        runs.add(
            next((folder for folder in file.parents[:3] if (folder / RUN_FILE).is_file()), None)
        )
    return len(runs) == 1 and None not in runs


def average_loras(
    parts: WeightedDeltas, one_run: bool, rank: int | None, fused_names: ModuleNames | None
) -> tuple[dict[str, Delta], str]:
    """Return the average of LoRAs, and a line that says which one was formed.

    Of one run the factors are averaged, unless a rank is asked for; else the deltas.
    """
    from simpletuner.adapters import average_deltas, merge_deltas
    from simpletuner.adapters.deltas import LowRankDelta

    if not one_run or rank is not None:
        deltas, wanted, error = average_deltas.average_deltas(parts, rank, fused_names)
        return deltas, f"the mean of the deltas at rank {wanted}: it differs by {error:.2%}"
    deltas = average_deltas.average_factors(parts)
    described = "the mean of the factors, because all sources are of one run"
    if all(isinstance(d, LowRankDelta) and d.magnitude is None for d in deltas.values()):
        exact = merge_deltas.sum_weighted_loras(parts)
        distance = average_deltas.relative_distance(deltas, exact)
        described += f"; its delta differs from the mean of the deltas by {distance:.2%}"
    return deltas, described
