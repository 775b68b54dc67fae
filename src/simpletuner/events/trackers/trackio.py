"""Trackio, which stores its data on this computer unless configured otherwise."""

from __future__ import annotations

from simpletuner.errors import MissingExtra
from simpletuner.events.event_types import Event, ImageSaved
from simpletuner.events.trackers import METRIC_EVENTS, TrackerSettings, event_scalars

try:
    import trackio
except ImportError as error:
    raise MissingExtra("report_to = trackio needs: pip install 'simpletuner[trackio]'") from error


class Tracker:
    """Sink for Trackio."""

    def __init__(self, tracked: TrackerSettings) -> None:
        self._run_dir = tracked.run_dir
        self._run = trackio.init(
            project=tracked.project,
            name=tracked.run_name,
            config=dict(tracked.config),
            resume="allow",
        )

    def __call__(self, event: Event) -> None:
        if isinstance(event, METRIC_EVENTS):
            trackio.log(event_scalars(event), step=event.step)
        elif isinstance(event, ImageSaved):
            image = trackio.Image(str(self._run_dir / event.path), caption=event.prompt)
            trackio.log({f"images/{event.prompt_id}/{event.weights}": image}, step=event.step)

    def close(self) -> None:
        trackio.finish()
