"""TensorBoard files in <run folder>/tensorboard, written without torch."""

from __future__ import annotations

import json
import time

from simpletuner.errors import MissingExtra
from simpletuner.events.event_types import Event, ImageSaved, RunResumed
from simpletuner.events.trackers import METRIC_EVENTS, TrackerSettings, event_scalars

try:
    from tensorboard.compat.proto.event_pb2 import Event as Written
    from tensorboard.compat.proto.event_pb2 import SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary import text_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ImportError as error:
    raise MissingExtra(
        "report_to = tensorboard needs: pip install 'simpletuner[tensorboard]'"
    ) from error


class Tracker:
    """Sink for TensorBoard."""

    def __init__(self, tracked: TrackerSettings) -> None:
        self._run_dir = tracked.run_dir
        self._writer = EventFileWriter(str(tracked.run_dir / "tensorboard"), flush_secs=10)
        config = json.dumps(dict(tracked.config), indent=2, default=str)
        self._write(
            0, summary=text_pb("config", "\n".join(f"    {line}" for line in config.splitlines()))
        )

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunResumed):  # hides what a replaced process wrote after this step
            self._write(event.step + 1, session_log=SessionLog(status=SessionLog.START))
        elif isinstance(event, METRIC_EVENTS):
            values = [
                Summary.Value(tag=tag, simple_value=value)
                for tag, value in event_scalars(event).items()
            ]
            self._write(event.step, summary=Summary(value=values))
        elif isinstance(event, ImageSaved):
            image = Summary.Image(
                width=event.width_px,
                height=event.height_px,
                colorspace=3,
                encoded_image_string=(self._run_dir / event.path).read_bytes(),
            )
            tag = (
                f"{event.prompt_id}/{event.width_px}x{event.height_px}/{event.seed}/{event.weights}"
            )
            self._write(event.step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **fields: object) -> None:
        self._writer.add_event(Written(wall_time=time.time(), step=step, **fields))
