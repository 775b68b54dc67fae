"""Experiment trackers. Each optional package is imported in the one file named after it, on demand."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.events.sinks import ClosingSink
from simpletuner.events.types import Evaluated, Event, Scored, Stepped

TRACKERS = ("tensorboard", "wandb", "trackio")
MEASURED = (Stepped, Evaluated, Scored)  # events with figures


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of the run. config: the resolved options."""

    run_dir: Path
    project: str
    run_name: str
    config: Mapping[str, Any]


def make(
    report_to: str, run_dir: Path, project: str, run_name: str | None, config: Mapping[str, Any]
) -> list[ClosingSink]:
    """One sink with close() per name of the comma list. MissingExtra when its package is not installed."""
    tracked = Tracked(run_dir, project, run_name or run_dir.resolve().name, config)
    return [kind(tracked) for kind in kinds(report_to)]


def kinds(report_to: str) -> list[Callable[[Tracked], ClosingSink]]:
    """The trackers of a comma list, which config/rules.py has checked; not opened yet."""
    names = [name.strip() for name in report_to.split(",") if name.strip() != "none"]
    return [importlib.import_module(f"{__name__}.{name}").Tracker for name in dict.fromkeys(names)]


def scalars(event: Event) -> dict[str, float]:
    """The figures of an event under the names that trackers show."""
    if isinstance(event, Stepped):
        found = {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/epoch": float(event.epoch),
            "time/seconds_per_step": event.seconds,
        }
        if event.memory_gib is not None:
            found["device/memory_gib"] = event.memory_gib
        return found
    if isinstance(event, Evaluated):
        at = f"eval/{event.dataset}/{event.split}"
        found = {f"{at}/loss": event.loss, f"{at}/change": event.change, f"{at}/change_se": event.change_se}
        found.update({f"{at}/sigma_{sigma:.3f}": loss for sigma, loss in event.by_sigma})
        return found
    if isinstance(event, Scored):
        at = f"score/{event.metric}"
        return {f"{at}/{name}{end}": figure for name, (rate, error, _) in event.rates.items()
                for end, figure in (("", rate), ("_se", error))}  # fmt: skip
    return {}
