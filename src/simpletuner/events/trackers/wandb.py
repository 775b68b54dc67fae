"""Weights & Biases."""

from __future__ import annotations

import hashlib
import os

from simpletuner.errors import MissingExtra
from simpletuner.events.event_types import Event, ImageSaved
from simpletuner.events.trackers import METRIC_EVENTS, TrackerSettings, event_scalars

try:
    import wandb
except ImportError as error:
    raise MissingExtra("report_to = wandb needs: pip install 'simpletuner[wandb]'") from error


class Tracker:
    """Sink for Weights & Biases.

    The id is derived from the run folder, so that a resumed run continues in the same page.
    """

    def __init__(self, tracked: TrackerSettings) -> None:
        self._run_dir = tracked.run_dir
        self._run = wandb.init(
            project=tracked.project,
            name=tracked.run_name,
            id=hashlib.sha256(os.fsencode(tracked.run_dir.resolve())).hexdigest()[:16],
            resume="allow",
            dir=str(tracked.run_dir),
            config=dict(tracked.config),
        )
        # Its own step counter cannot go back, which a resume from an older checkpoint needs.
        self._run.define_metric("*", step_metric="step")

    def __call__(self, event: Event) -> None:
        if isinstance(event, METRIC_EVENTS):
            self._run.log({"step": event.step, **event_scalars(event)})
        elif isinstance(event, ImageSaved):
            image = wandb.Image(str(self._run_dir / event.path), caption=event.prompt)
            self._run.log({"step": event.step, f"images/{event.prompt_id}/{event.weights}": image})

    def close(self) -> None:
        self._run.finish()
