"""Experiment trackers. Each optional package is imported on demand, in the file of its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.events.event_types import Event, LossEvaluated, ScoresComputed, StepCompleted
from simpletuner.events.sinks import CloseableSink

METRIC_EVENTS = (StepCompleted, LossEvaluated, ScoresComputed)  # events with figures


@dataclass(frozen=True)
class TrackerSettings:
    """Facts about the run for a tracker. config: the resolved options."""

    run_dir: Path
    project: str
    run_name: str
    config: Mapping[str, Any]


def make_trackers(
    report_to: str, run_dir: Path, project: str, run_name: str | None, config: Mapping[str, Any]
) -> list[CloseableSink]:
    """Return one sink per name of the comma-separated list.

    Raises MissingExtra when a package is not installed.
    """
    tracked = TrackerSettings(run_dir, project, run_name or run_dir.resolve().name, config)
    return [kind(tracked) for kind in tracker_classes(report_to)]


def tracker_classes(report_to: str) -> list[Callable[[TrackerSettings], CloseableSink]]:
    """Return the trackers of a comma-separated list, not opened yet.

    config/constraints.py has checked the names.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() != "none"]
    return [importlib.import_module(f"{__name__}.{name}").Tracker for name in dict.fromkeys(names)]


def event_scalars(event: Event) -> dict[str, float]:
    """Return the numbers of an event under the names that trackers show."""
    if isinstance(event, StepCompleted):
        values = {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/epoch": float(event.epoch),
            "time/seconds_per_step": event.seconds,
        }
        if event.memory_gib is not None:
            values["device/memory_gib"] = event.memory_gib
        return values
    if isinstance(event, LossEvaluated):
        at = f"eval/{event.dataset}/{event.split}"
        values = {
            f"{at}/loss": event.loss,
            f"{at}/change": event.change,
            f"{at}/change_se": event.change_se,
        }
        values.update({f"{at}/sigma_{sigma:.3f}": loss for sigma, loss in event.by_sigma})
        return values
    if isinstance(event, ScoresComputed):
        at = f"score/{event.metric}"
        return {
            f"{at}/{name}{end}": figure
            for name, (rate, error, _) in event.rates.items()
            for end, figure in (("", rate), ("_se", error))
        }
    return {}
