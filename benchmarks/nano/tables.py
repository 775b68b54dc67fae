"""From results of cells to tables: means over seeds with their standard errors, and paired differences."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from benchmarks.nano import plan, world
from benchmarks.nano.plan import Cell, Part, Row, Size
from benchmarks.nano.result import Result, measures

LIBRARIES = ("simpletuner", "torch", "diffusers", "peft", "transformers")
Table = dict[str, Any]  # what a file of results/ holds; `table` makes it, markdown.py and figure.py read it


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds; se: its standard error, None of a single seed."""

    mean: float
    se: float | None


def estimate(values: Sequence[float]) -> Estimate:
    if len(values) < 2:
        return Estimate(short(values[0]), None)
    return Estimate(short(statistics.fmean(values)), short(statistics.stdev(values) / math.sqrt(len(values))))


def short(value: float) -> float:
    """Six digits: more are of no use to anyone who reads the file."""
    return float(f"{value:.6g}")


def table(
    name: str, done: Mapping[str, Result], size: Size, seeds: Sequence[int], command: str, base: str
) -> Table:
    """done: results by cell name. Rows without a finished cell are there, empty."""
    untouched = done.get(plan.cell_name("base", plan.SEEDS[0]))
    parts = [_part(one, done, size, seeds, untouched) for one in plan.TABLES[name]]
    dates = [day for part in parts for row in part["rows"] for day in row["dates"]]
    return {
        "table": name, "command": command, "date": max(dates, default=time.strftime("%Y-%m-%d")),
        "versions": {library: version(library) for library in LIBRARIES}, "base": base,
        "seeds": list(seeds), "size": {key: list(value) if isinstance(value, tuple) else value
                                        for key, value in vars(size).items()},
        "parts": parts,
    }  # fmt: skip


def _part(
    part: Part, done: Mapping[str, Result], size: Size, seeds: Sequence[int], untouched: Result | None
) -> Table:
    known = plan.variants(size)
    rows = [_row(row, known[row.variant], done, size, seeds, untouched) for row in part.rows]
    for row in rows:
        row["against"] = _against(row, rows[0]) if row is not rows[0] else {}
    first = known[part.rows[0].variant]
    told: Table = {
        "name": part.name, "title": part.title, "reference": part.rows[0].label,
        "settings": world.settings(Cell(first, seeds[0]), size), "rows": rows,
    }  # fmt: skip
    if untouched is not None:
        told["untouched"] = {name: short(value) for name, value in measures(untouched, None).items()}
    trials = sorted({name for row in part.rows for name in known[row.variant].rate_from})
    found = [done.get(plan.cell_name(name, plan.TRIAL_SEED)) for name in trials]
    if any(found):
        told["trials"] = [
            {"learning_rate": one.learning_rate, "held_out": one.held_out} for one in found if one is not None
        ]
    return told


def _row(
    row: Row, variant: plan.Variant, done: Mapping[str, Result], size: Size, seeds: Sequence[int],
    untouched: Result | None,
) -> Table:  # fmt: skip
    own = {seed: done.get(plan.cell_name(row.variant, seed)) for seed in seeds}
    found = {seed: one for seed, one in own.items() if one is not None}
    by_seed = {seed: measures(one, untouched) for seed, one in found.items()}
    names = sorted(set.intersection(*map(set, by_seed.values()))) if by_seed else []
    told = {
        name: vars(estimate([by_seed[seed][name] for seed in found]))
        | {"per_seed": {str(seed): short(by_seed[seed][name]) for seed in found}}
        for name in names
    }
    return {
        "label": row.label, "variant": row.variant, "options": dict(variant.options),
        "learning_rates": sorted({one.learning_rate for one in found.values()}),
        "finished": len(found), "asked": len(seeds), "dates": sorted({one.date for one in found.values()}),
        "measures": told,
    }  # fmt: skip


def _against(row: Table, reference: Table) -> dict[str, dict[str, float | None]]:
    """Row minus reference, seed by seed: what both share with a seed cancels. Ratios for
    variances and for losses by sigma."""
    told: dict[str, dict[str, float | None]] = {}
    for name, measured in row["measures"].items():
        other = reference["measures"].get(name, {"per_seed": {}})["per_seed"]
        shared = [seed for seed in measured["per_seed"] if seed in other]
        if not shared:
            continue
        mine = [measured["per_seed"][seed] for seed in shared]
        theirs = [other[seed] for seed in shared]
        if not name.startswith("sigma_") and not name.endswith("_variance"):
            told[name] = vars(estimate([a - b for a, b in zip(mine, theirs)]))
        elif all(theirs):
            told[f"{name}_ratio"] = vars(estimate([a / b for a, b in zip(mine, theirs)]))
    return told
