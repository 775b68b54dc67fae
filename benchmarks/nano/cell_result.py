"""What a finished cell leaves: numbers read from its events, small enough to keep all of them."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from simpletuner.events import event_types
from simpletuner.events.event_log import read_events
from simpletuner.events.run_history import RunHistory, read_run_history

RESULT_FILE = "result.json"
WEIGHT_FILES = ("pytorch_lora_weights.safetensors", "transformer")
PARAMETERS_PATTERN = re.compile(r"([\d.]+) M parameters")
ScoreRates = dict[
    str, dict[str, tuple[float, float, int]]
]  # metric -> what is right -> rate, its error, of


@dataclass(frozen=True)
class CellResult:
    """One finished training. base: fingerprint of the bundled model. step_seconds: median, with
    whatever ran beside it. held_out and by_sigma: of the unseen pictures, at the end; _start:
    before training. variances: over steps. parameters_m: trained, millions. file_mb: the weights
    that were kept."""

    cell: str
    options: Mapping[str, object]
    base: str
    date: str
    seconds: float
    step_seconds: float
    loss_mean: float
    loss_variance: float
    grad_mean: float
    grad_variance: float
    held_out: float
    held_out_start: float
    by_sigma: list[tuple[float, float]]
    by_sigma_start: list[tuple[float, float]]
    scores: ScoreRates = field(default_factory=dict)
    parameters_m: float = 0.0
    file_mb: float = 0.0

    @property
    def learning_rate(self) -> float:
        return float(str(self.options["learning_rate"]))


def read_finished_run(
    run_dir: Path, cell: str, options: Mapping[str, object], base: str, seconds: float
) -> CellResult:
    """Read a run that came to its end. RuntimeError when something is missing in its events."""
    history = read_run_history(run_dir)
    if (
        not isinstance(history.end_event, event_types.RunFinished)
        or history.end_event.status != "done"
        or not history.steps
    ):
        raise RuntimeError(f"{cell}: {run_dir} did not come to its end")
    evaluated = {
        step: event for (_, split, step), event in history.evaluations.items() if split == "eval"
    }
    if len(evaluated) < 2:
        raise RuntimeError(f"{cell}: {run_dir} has no held-out loss of its first and last step")
    first, last = evaluated[min(evaluated)], evaluated[max(evaluated)]
    losses = [event.loss for event in history.steps.values()]
    norms = [event.grad_norm for event in history.steps.values()]
    return CellResult(
        cell, dict(options), base, time.strftime("%Y-%m-%d"), round(seconds, 1),
        statistics.median(event.seconds for event in history.steps.values()),
        statistics.fmean(losses), variance(losses), statistics.fmean(norms), variance(norms),
        last.loss, first.loss, list(last.by_sigma), list(first.by_sigma),
        scores_at_step(history, max(evaluated)), read_parameters_m(run_dir), weights_file_mb(history),
    )  # fmt: skip


def variance(values: list[float]) -> float:
    return statistics.variance(values) if len(values) > 1 else 0.0


def scores_at_step(history: RunHistory, step: int) -> ScoreRates:
    """The scores after a step."""
    return {
        metric: dict(event.rates) for (metric, at), event in history.scores.items() if at == step
    }


def read_parameters_m(run_dir: Path) -> float:
    """As the run tells it."""
    notes = [record.event for record in read_events(run_dir / "events.jsonl")]
    told = [
        PARAMETERS_PATTERN.search(event.message)
        for event in notes
        if isinstance(event, event_types.NoticeIssued)
    ]
    return next((float(match[1]) for match in reversed(told) if match), 0.0)


def weights_file_mb(history: RunHistory) -> float:
    return next(
        (
            history.saved_weights[name].size_bytes / 1e6
            for name in WEIGHT_FILES
            if name in history.saved_weights
        ),
        0.0,
    )


def write_result(path: Path, result: CellResult) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(result)) + "\n", encoding="utf-8")
    temporary.replace(path)


def load_result(path: Path) -> CellResult | None:
    """None when the cell is not finished."""
    if not path.exists():
        return None
    return CellResult(**json.loads(path.read_text(encoding="utf-8")))


def named_measures(result: CellResult, base: CellResult | None) -> dict[str, float]:
    """The numbers that tables take means of, by name; what was not measured is absent.

    lost: how much of the untouched base's score of shapes is gone (of all, everything said being right).
    """
    told = {
        name: value
        for name, value in asdict(result).items()
        if isinstance(value, float) and name not in ("seconds",)
    }
    for metric, rates in result.scores.items():
        told |= {f"{metric}_{name}": rate[0] for name, rate in rates.items()}
    told["held_out_change"] = result.held_out - result.held_out_start
    for sigma, loss in result.by_sigma:
        told[f"sigma_{sigma:.3g}"] = loss
    if base is not None and "shapes_all" in told and "shapes" in base.scores:
        told |= {f"lost_{name}": base.scores["shapes"][name][0] - told[f"shapes_{name}"]
                 for name in ("all", "shape")}  # fmt: skip
    return told
