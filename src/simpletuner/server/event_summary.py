"""The summary of a run, computed from its events as they are read.

When many steps arrive at once, only some of them are parsed: parsing 25,000 steps takes too long
for the list of runs, which shows no single step.
"""

from __future__ import annotations

import statistics
from array import array
from bisect import bisect_left
from typing import Any

from simpletuner.events import event_types
from simpletuner.events.event_log import EventRecord, event_from_dict
from simpletuner.events.formatting import SmoothedMean
from simpletuner.events.run_history import RunHistory
from simpletuner.server import file_reader
from simpletuner.server.job_states import Phase
from simpletuner.server.schemas.runs import RunResume, RunStage

STEP_MARKER = b'"kind": "step"'
MAX_SAMPLED_STEPS = 256  # steps parsed per chunk, besides the last ones
MIN_MEASURED_STEPS = 3  # the first steps of a process are slower than the others
SPEED_WINDOW_STEPS = 50  # steps over which the speed is measured
MAX_CURVE_POINTS = 60
MAX_NOTES = 200
SMOOTHING = 0.3


class LossCurve:
    """Mean losses of at most MAX_CURVE_POINTS bins, whose width doubles when there are too many.

    The bins are arrays, in order: a server has those of a thousand runs in memory.
    """

    def __init__(self) -> None:
        self._width = 1  # steps per bin
        self._indexes = array("q")
        self._totals = array("d")  # sums of the losses of a bin
        self._counts = array("q")

    def add(self, step: int, loss: float) -> None:
        if loss != loss:
            return
        self._add_to_bin((step - 1) // self._width, loss, 1)
        while len(self._indexes) > MAX_CURVE_POINTS:
            self._width *= 2
            old_bins = zip(self._indexes, self._totals, self._counts)
            self._indexes, self._totals, self._counts = array("q"), array("d"), array("q")
            for index, total, count in old_bins:
                self._add_to_bin(index // 2, total, count)

    def _add_to_bin(self, index: int, total: float, count: int) -> None:
        at = bisect_left(self._indexes, index)
        if at == len(self._indexes) or self._indexes[at] != index:
            self._indexes.insert(at, index)
            self._totals.insert(at, 0.0)
            self._counts.insert(at, 0)
        self._totals[at] += total
        self._counts[at] += count

    def drop_after(self, step: int) -> None:
        """Remove the bins that begin after `step`."""
        first_dropped = bisect_left(self._indexes, -(-step // self._width))
        for bins in (self._indexes, self._totals, self._counts):
            del bins[first_dropped:]

    def points(self) -> list[float]:
        """Return the smoothed means in order, with four significant digits."""
        smooth = SmoothedMean(SMOOTHING)
        return [
            float(f"{smooth(total / count):.4g}")
            for total, count in zip(self._totals, self._counts)
        ]


class EventSummary:
    """The state of a run after the events that were added.

    history: all events except the steps. loss_curve: the losses of the steps. process_started_t:
    time of the first event of the last process, in unix seconds. resumes: all resumes, in order.
    """

    def __init__(self) -> None:
        self.history = RunHistory()
        self.last_step_event: event_types.StepCompleted | None = None
        self.process_started_t: float | None = None
        self.training_started = False
        self.stages: dict[str, RunStage] = {}
        self.stages_done: list[str] = []
        self.notes: list[str] = []  # the last MAX_NOTES
        self.loss_curve = LossCurve()
        self.resumes: list[RunResume] = []
        self._reached_step = 0  # by the process before the last start
        # Of the last SPEED_WINDOW_STEPS steps: seconds each, numbers, unix seconds.
        self._step_seconds = array("d")
        self._recent_steps = array("d")
        self._recent_times = array("d")

    @property
    def step(self) -> int:
        if self.last_step_event is not None:
            return self.last_step_event.step
        start = self.history.start_event
        return start.resumed_step if start else 0

    @property
    def total_steps(self) -> int | None:
        if self.last_step_event is not None:
            return self.last_step_event.total
        start = self.history.start_event
        return start.total_steps if start else None

    @property
    def phase(self) -> Phase:
        """The phase of the last process, which is meaningful while it is alive."""
        if self.training_started:
            return "running"
        return "caching" if self.stages or self.stages_done else "starting"

    @property
    def left_s(self) -> float | None:
        """The estimated remaining time.

        It uses the wall-clock time of the recent steps, so that validation images and checkpoints
        count too.
        """
        if self.last_step_event is None or self.total_steps is None or not self._recent_steps:
            return None
        first_step, last_step = self._recent_steps[0], self._recent_steps[-1]
        first_t, last_t = self._recent_times[0], self._recent_times[-1]
        seconds_per_step = self.last_step_event.seconds
        if last_step > first_step and last_t > first_t:  # otherwise the clock was set back
            seconds_per_step = (last_t - first_t) / (last_step - first_step)
        return max(0.0, seconds_per_step * (self.total_steps - last_step))

    @property
    def seconds_per_step(self) -> float | None:
        """The median time of the recent steps, None before the third one."""
        if len(self._step_seconds) < MIN_MEASURED_STEPS:
            return None
        return statistics.median(self._step_seconds)

    @property
    def best_step(self) -> int | None:
        """The step with the lowest held-out loss."""
        evaluations = self.history.evaluations.values()
        return max((event.step for event in evaluations if event.best), default=None)

    @property
    def latest_image_path(self) -> str | None:
        """The path of the newest validation image."""
        newest = max(self.history.images.values(), key=lambda image: image.step, default=None)
        return newest.path if newest else None

    def add_lines(self, lines: list[bytes], end_offset: int) -> None:
        """Add lines of events.jsonl up to byte `end_offset`, but only a sample of the steps."""
        steps = [index for index, line in enumerate(lines) if STEP_MARKER in line[:64]]
        stride = max(1, len(steps) // MAX_SAMPLED_STEPS)
        skipped = set(steps[:-SPEED_WINDOW_STEPS]) - set(steps[::stride])
        for index, line in enumerate(lines):
            if index in skipped:
                continue
            record = file_reader.parse_record(line)
            if record is not None:
                self._add_record(record, end_offset)

    def _add_record(self, record: dict[str, Any], end_offset: int) -> None:
        event = event_from_dict(record)
        t = float(record["t"])
        if event is None:
            return
        if self.process_started_t is None or self._is_new_process(event):
            self.process_started_t = t
            self.training_started = False
            self.history.end_event = None
            self.stages = {}
            self.stages_done = []
        if isinstance(event, event_types.StepCompleted):
            self._add_step(event, t)
            return
        self.history.add_record(EventRecord(t, event, end_offset))
        if isinstance(event, event_types.RunStarted):
            self._reached_step = self.step if self.last_step_event is not None else 0
        elif isinstance(event, event_types.RunResumed):
            repeated = max(0, self._reached_step - event.step)
            self.resumes.append(
                RunResume(t=t, step=event.step, checkpoint=event.path, repeated_steps=repeated)
            )
        self._apply_event(event)

    def _is_new_process(self, event: event_types.Event) -> bool:
        """Return True for the first event of a process, which scans the datasets.

        A previous process that was killed wrote no event about its end.
        """
        return isinstance(event, event_types.StageStarted) and (
            self.history.end_event is not None or (self.training_started and event.stage == "scan")
        )

    def _add_step(self, event: event_types.StepCompleted, t: float) -> None:
        self.last_step_event = event
        self.history.last_event_time = t
        self.stages.clear()
        _append_recent(self._recent_steps, event.step)
        _append_recent(self._recent_times, t)
        _append_recent(self._step_seconds, event.seconds)
        self.loss_curve.add(event.step, event.loss)

    def _apply_event(self, event: event_types.Event) -> None:
        match event:
            case event_types.StageStarted(stage=name):
                self.stages[name] = RunStage(
                    stage=name, done=0, total=event.total, unit=event.unit, left_s=None
                )
            case event_types.StageProgress(stage=name):
                unit = self.stages[name].unit if name in self.stages else ""
                self.stages[name] = RunStage(
                    stage=name, done=event.done, total=event.total, unit=unit, left_s=event.left_s
                )
            case event_types.StageCompleted(stage=name):
                self.stages.pop(name, None)
                if name not in self.stages_done:
                    self.stages_done.append(name)
            case event_types.RunStarted(resumed_step=step) | event_types.RunResumed(step=step):
                self.training_started = True
                self.loss_curve.drop_after(step)
                del self._recent_steps[:], self._recent_times[:]
                self.last_step_event = None
            case event_types.NoticeIssued(message=message):
                self.notes.append(message)
                del self.notes[:-MAX_NOTES]
            case event_types.RunFinished() | event_types.RunFailed():
                self.stages.clear()


def _append_recent(numbers: array[float], value: float) -> None:
    numbers.append(value)
    del numbers[:-SPEED_WINDOW_STEPS]
