"""From results of cells to tables: means over seeds with their standard errors, and paired
differences.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from benchmarks.nano import experiment_inputs, experiments
from benchmarks.nano.cell_result import CellResult, named_measures
from benchmarks.nano.experiments import Cell, ExperimentSize, TablePart, TableRow

LIBRARIES = ("simpletuner", "torch", "diffusers", "peft", "transformers")
# The shares of images among the measures with words in verdicts.py, and the scores they come from.
COUNTED_SHARES = {"zorbo_zorbo": ("zorbo", "zorbo"), "lost_all": ("shapes", "all")}
TableData = dict[
    str, Any
    # what a file of results/ holds; `table` makes it, markdown_tables.py and densities_figure.py read
    # it
]


@dataclass(frozen=True)
class MeanEstimate:
    """Mean over seeds; se: its standard error, None of a single seed."""

    mean: float
    se: float | None


def estimate_mean(values: Sequence[float]) -> MeanEstimate:
    if len(values) < 2:
        return MeanEstimate(round_to_six_digits(values[0]), None)
    return MeanEstimate(
        round_to_six_digits(statistics.fmean(values)),
        round_to_six_digits(statistics.stdev(values) / math.sqrt(len(values))),
    )


def round_to_six_digits(value: float) -> float:
    """Six digits: more are of no use to anyone who reads the file."""
    return float(f"{value:.6g}")


def build_table(
    name: str,
    done: Mapping[str, CellResult],
    size: ExperimentSize,
    seeds: Sequence[int],
    command: str,
    base: str,
) -> TableData:
    """done: results by cell name. Rows without a finished cell are there, empty."""
    untouched = done.get(experiments.cell_name("base", experiments.SEEDS[0]))
    parts = [_build_part(one, done, size, seeds, untouched) for one in experiments.TABLES[name]]
    dates = [day for part in parts for row in part["rows"] for day in row["dates"]]
    return {
        "table": name, "command": command, "date": max(dates, default=time.strftime("%Y-%m-%d")),
        "versions": {library: version(library) for library in LIBRARIES}, "base": base,
        "seeds": list(seeds), "size": {key: list(value) if isinstance(value, tuple) else value
                                        for key, value in vars(size).items()},
        "parts": parts,
    }  # fmt: skip


def _build_part(
    part: TablePart,
    done: Mapping[str, CellResult],
    size: ExperimentSize,
    seeds: Sequence[int],
    untouched: CellResult | None,
) -> TableData:
    known = experiments.build_variants(size)
    rows = [_build_row(row, known[row.variant], done, size, seeds, untouched) for row in part.rows]
    for row in rows:
        row["against"] = _differences_from(row, rows[0]) if row is not rows[0] else {}
    first = known[part.rows[0].variant]
    told: TableData = {
        "name": part.name, "title": part.title, "reference": part.rows[0].label,
        "settings": experiment_inputs.cell_options(Cell(first, seeds[0]), size), "rows": rows,
    }  # fmt: skip
    if untouched is not None:
        told["untouched"] = {
            name: round_to_six_digits(value)
            for name, value in named_measures(untouched, None).items()
        }
    trials = sorted({name for row in part.rows for name in known[row.variant].learning_rate_trials})
    found = [done.get(experiments.cell_name(name, experiments.TRIAL_SEED)) for name in trials]
    if any(found):
        told["trials"] = [
            {"learning_rate": one.learning_rate, "held_out": one.held_out}
            for one in found
            if one is not None
        ]
    return told


def _build_row(
    row: TableRow, variant: experiments.Variant, done: Mapping[str, CellResult], size: ExperimentSize, seeds: Sequence[int],  # noqa: E501
    untouched: CellResult | None,
) -> TableData:  # fmt: skip
    own = {seed: done.get(experiments.cell_name(row.variant, seed)) for seed in seeds}
    found = {seed: one for seed, one in own.items() if one is not None}
    by_seed = {seed: named_measures(one, untouched) for seed, one in found.items()}
    names = sorted(set.intersection(*map(set, by_seed.values()))) if by_seed else []
    told = {
        name: vars(estimate_mean([by_seed[seed][name] for seed in found]))
        | {"per_seed": {str(seed): round_to_six_digits(by_seed[seed][name]) for seed in found}}
        for name in names
    }
    images = {
        name: int(one.scores[metric][rate][2])
        for one in found.values()
        for name, (metric, rate) in COUNTED_SHARES.items()
        if rate in one.scores.get(metric, {})
    }
    return {
        "label": row.label, "variant": row.variant, "options": dict(variant.options),
        "learning_rates": sorted({one.learning_rate for one in found.values()}),
        "finished": len(found), "asked": len(seeds), "dates": sorted({one.date for one in found.values()}),
        "images": images, "measures": told,
    }  # fmt: skip


def _differences_from(row: TableData, reference: TableData) -> dict[str, dict[str, float | None]]:
    """Row minus reference, seed by seed: what both share with a seed cancels. Ratios for
    variances and for losses by sigma.

    A share of n images is known to 1 / n only, so the error of a mean difference is at least that
    of two rounded numbers, 1 / (n sqrt(6 seeds)): three seeds that differ by the same one image are
    no certainty.
    """
    told: dict[str, dict[str, float | None]] = {}
    for name, measured in row["measures"].items():
        other = reference["measures"].get(name, {"per_seed": {}})["per_seed"]
        shared = [seed for seed in measured["per_seed"] if seed in other]
        if not shared:
            continue
        mine = [measured["per_seed"][seed] for seed in shared]
        theirs = [other[seed] for seed in shared]
        if not name.startswith("sigma_") and not name.endswith("_variance"):
            estimate = estimate_mean([a - b for a, b in zip(mine, theirs)])
            if name in row["images"] and estimate.se is not None:
                rounding = 1 / (row["images"][name] * math.sqrt(6 * len(shared)))
                estimate = replace(estimate, se=max(estimate.se, round_to_six_digits(rounding)))
            told[name] = vars(estimate)
        elif all(theirs):
            told[f"{name}_ratio"] = vars(estimate_mean([a / b for a, b in zip(mine, theirs)]))
    return told
