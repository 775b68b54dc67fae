"""Where a change of the weights is too small to see, and where it destroys: the limits of the findings.

    python -m benchmarks.nano.weight_change                 the runs of the last tables and of the sweep
    python -m benchmarks.nano.weight_change --out DIR       run folders of `python -m benchmarks.nano`

Reads what is finished and trains nothing: the events of the cells in OUT, and tuning.json of the results.
For each run, norm of delta W over norm of W, what was learnt (zorbos, against the untouched base) and what
of the base's score of shapes is left. Writes weight_change.md, which says for both limits of
simpletuner/events/findings.py how many runs support them, and which round value would fit better.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nano.cell_result import RESULT_FILE
from benchmarks.nano.experiment_inputs import ROOT, base_fingerprint
from benchmarks.nano.experiments import FROZEN_LEARNING_RATE
from benchmarks.nano.markdown_tables import render_grid

from simpletuner.events.event_log import read_events
from simpletuner.events.event_types import ScoresComputed, WeightChangeMeasured
from simpletuner.events.findings import FAR_TOO_STRONG_ABOVE, LEARNT_NOTHING_BELOW

RESULTS = ROOT / "benchmarks" / "nano" / "results"
CLEAR_ERRORS = 2.0  # standard errors from which a run has learnt something
DESTROYED_SHARE = 0.5  # of the base's score that is gone
SCORES = frozenset({"zorbo", "shapes"})
Rate = tuple[float, float]  # a share and its standard error


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run. change: norm of delta W over norm of W. zorbo, shapes: shares that are right."""

    name: str
    change: float
    zorbo: Rate
    shapes: Rate

    def has_learnt(self, base: MeasuredRun) -> bool:
        error = math.hypot(self.zorbo[1], base.zorbo[1])
        return self.zorbo[0] - base.zorbo[0] > CLEAR_ERRORS * error

    def is_destroyed(self, base: MeasuredRun) -> bool:
        return self.shapes[0] < (1 - DESTROYED_SHARE) * base.shapes[0]


@dataclass(frozen=True)
class Limit:
    """What the runs say about a limit.

    confirming: runs beyond it of which it is true. wrong: runs beyond it of which it is not.
    missed: runs on this side of which it would be true. better: a round value with no wrong run.
    """

    value: float
    confirming: int
    wrong: int
    missed: int
    better: float | None

    def words(self) -> str:
        if not self.confirming and not self.wrong and not self.missed:
            return "no run on its other side: neither supported nor contradicted"
        if self.wrong:
            advice = f"; {self.better:g} would have none" if self.better else ""
            return f"contradicted by {_count(self.wrong)}{advice}"
        if self.missed and not self.confirming:
            advice = f"; {self.better:g} would find them" if self.better else ""
            return f"finds none of {_count(self.missed)}{advice}"
        missed = f"; it misses {self.missed}" if self.missed else ""
        advice = f", and {self.better:g} would find more" if missed and self.better else ""
        return f"supported by {_count(self.confirming)}, contradicted by none{missed}{advice}"


def _count(runs: int) -> str:
    return f"{runs} run{'' if runs == 1 else 's'}"


def read_base(path: Path) -> MeasuredRun:
    """Return the untouched base's scores, from a table of results. Raises ValueError without them."""
    table = json.loads(path.read_text(encoding="utf-8"))
    if table["base"] != base_fingerprint():
        raise ValueError(f"{path.name} is of another base: run python -m benchmarks.nano again")
    known, prompts = table["parts"][0]["untouched"], table["size"]["prompts"]
    return MeasuredRun("untouched base", 0.0, _rate(known["zorbo_zorbo"], prompts),
                       _rate(known["shapes_all"], prompts))  # fmt: skip


def _rate(share: float, count: int) -> Rate:
    return share, math.sqrt(share * (1 - share) / count)


def read_cells(out: Path) -> Iterator[MeasuredRun]:
    """Yield the finished cells that have moved weights and were scored."""
    for path in sorted(out.glob(f"cells/*/seed-*/{RESULT_FILE}")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["base"] != base_fingerprint():
            continue
        if float(result["options"]["learning_rate"]) == FROZEN_LEARNING_RATE:
            continue
        run = read_run(path.parent, result["cell"])
        if run is not None:
            yield run


def read_run(folder: Path, name: str) -> MeasuredRun | None:
    """Return a run by its events; None where it has no change or no scores after its last step."""
    change, scores = None, dict[str, Rate]()
    for record in read_events(folder / "events.jsonl"):
        event = record.event
        if isinstance(event, WeightChangeMeasured):
            change = event.total
        if isinstance(event, ScoresComputed) and event.step and event.metric in SCORES:
            value, error, _ = event.rates["all" if event.metric == "shapes" else event.metric]
            scores[event.metric] = (value, error)
    if change is None or not SCORES.issubset(scores):
        return None
    return MeasuredRun(name, change, scores["zorbo"], scores["shapes"])


def read_sweeps(path: Path) -> Iterator[MeasuredRun]:
    """Yield the scored runs of the sweeps over learning rates."""
    if not path.exists():
        return
    for row in json.loads(path.read_text(encoding="utf-8")):
        for run in row["runs"]:
            if run["weight_change"] is not None and SCORES.issubset(run["scores"]):
                name = f"rate {run['rate']:g}, seed {row['seed']}"
                zorbo, shapes = (tuple(run["scores"][metric]) for metric in ("zorbo", "shapes"))
                yield MeasuredRun(name, run["weight_change"], zorbo, shapes)


def judge_lower(runs: Sequence[MeasuredRun], base: MeasuredRun, value: float) -> Limit:
    """Return how well a limit separates runs that learnt nothing from those that learnt."""
    below = [run for run in runs if run.change < value]
    wrong = sum(run.has_learnt(base) or run.is_destroyed(base) for run in below)
    learnt = [run.change for run in runs if run.has_learnt(base) or run.is_destroyed(base)]
    missed = [
        run for run in runs
        if run.change >= value and not run.has_learnt(base) and not run.is_destroyed(base)
    ]  # fmt: skip
    better = round_down(min(learnt)) if learnt else None
    useful = better if better and any(run.change < better for run in runs) else None
    return Limit(value, len(below) - wrong, wrong, len(missed), useful if useful != value else None)


def judge_upper(runs: Sequence[MeasuredRun], base: MeasuredRun, value: float) -> Limit:
    """Return how well a limit separates runs that destroyed half of the base's score from others."""
    above = [run for run in runs if run.change > value]
    wrong = sum(not run.is_destroyed(base) for run in above)
    intact = [run.change for run in runs if not run.is_destroyed(base)]
    missed = [run for run in runs if run.change <= value and run.is_destroyed(base)]
    better = round_up(max(intact)) if intact else None
    useful = better if better and any(run.change > better for run in runs) else None
    return Limit(value, len(above) - wrong, wrong, len(missed), useful if useful != value else None)


def round_down(value: float) -> float:
    """Return the largest of 1, 2 or 5 times a power of ten that is not above a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(factor * power for factor in (1.0, 2.0, 5.0) if factor * power <= value * (1 + 1e-9))


def round_up(value: float) -> float:
    """Return the smallest of 1, 2 or 5 times a power of ten that is not below a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    return min(
        factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= value * (1 - 1e-9)
    )


def render(runs: Sequence[MeasuredRun], base: MeasuredRun) -> str:
    """Return the page of results."""
    lower = judge_lower(runs, base, LEARNT_NOTHING_BELOW)
    upper = judge_upper(runs, base, FAR_TOO_STRONG_ABOVE)
    rows = [
        [run.name, f"{run.change:.3%}", _percent(run.zorbo), _percent(run.shapes), _outcome(run, base)]
        for run in [base, *sorted(runs, key=lambda run: run.change)]
    ]  # fmt: skip
    lines = [
        "# What the size of the change of the weights says", "",
        f"`python -m benchmarks.nano.weight_change`, {_count(len(runs))} on chroma-nano, "
        f"base {base_fingerprint()}.",
        "", f"- Too small to see below {LEARNT_NOTHING_BELOW:.1%}: {lower.words()}.",
        f"- Far too strong above {FAR_TOO_STRONG_ABOVE:.0%}: {upper.words()}.", "",
        "Learnt: more zorbos than the untouched base by two standard errors. Destroyed: half of the base's "
        "score of shapes is gone.", "",
        render_grid(["run", "norm of delta W / norm of W", "zorbo %", "shapes, all right %", ""], rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _percent(rate: Rate) -> str:
    return f"{100 * rate[0]:.0f} ± {100 * rate[1]:.0f}"


def _outcome(run: MeasuredRun, base: MeasuredRun) -> str:
    if run is base:
        return ""
    words = ["learnt" if run.has_learnt(base) else "not learnt"]
    return ", ".join([*words, *(["destroyed"] if run.is_destroyed(base) else [])])


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nano.weight_change", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=ROOT / "output" / "benchmarks-nano", help="run folders"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of tuning.json")
    args = parser.parse_args(words)
    runs = [*read_cells(args.out), *read_sweeps(args.results / "tuning.json")]
    if not runs:
        print(f"no finished run in {args.out / 'cells'} and no {args.results / 'tuning.json'}: run "
              "python -m benchmarks.nano --only lora or python -m benchmarks.nano.tuning first")  # fmt: skip
        return 1
    page = render(runs, read_base(RESULTS / "lora.json"))
    (args.results / "weight_change.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
