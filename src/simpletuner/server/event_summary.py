"""What the events of a run came to, kept up to date by reading only what was added.

Of many steps at once only some are looked at: 25,000 cost 25 ms, and the list of runs shows no single one.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

from simpletuner.events import event_types
from simpletuner.events.event_log import EventRecord, event_from_dict
from simpletuner.events.formatting import SmoothedMean
from simpletuner.events.run_history import RunHistory
from simpletuner.server import log_reader
from simpletuner.server.schemas.runs import RunStage

Phase = Literal["starting", "caching", "running"]
STEP_MARKER = b'"kind": "step"'
MAX_SAMPLED_STEPS = 256  # steps of one reading, besides the last ones
SPEED_WINDOW_STEPS = 50  # steps that the speed is taken from
MAX_CURVE_POINTS = 60
MAX_NOTES = 200
SMOOTHING = 0.3


class LossCurve:
    """Mean losses of at most POINTS stretches of equal length, which doubles when they become too many."""

    def __init__(self) -> None:
        self._width = 1
        self._sums: dict[int, tuple[float, int]] = {}

    def add(self, step: int, loss: float) -> None:
        if loss != loss:
            return
        self._add_to_bin((step - 1) // self._width, loss, 1)
        while len(self._sums) > MAX_CURVE_POINTS:
            self._width *= 2
            old, self._sums = self._sums, {}
            for place, (total, count) in old.items():
                self._add_to_bin(place // 2, total, count)

    def _add_to_bin(self, place: int, total: float, count: int) -> None:
        before, seen = self._sums.get(place, (0.0, 0))
        self._sums[place] = (before + total, seen + count)

    def drop_after(self, step: int) -> None:
        self._sums = {
            place: kept for place, kept in self._sums.items() if place * self._width < step
        }

    def points(self) -> list[float]:
        smooth = SmoothedMean(SMOOTHING)
        return [
            float(f"{smooth(total / count):.4g}")
            for _, (total, count) in sorted(self._sums.items())
        ]


class EventSummary:
    """history: all but the steps. curve: their losses. process_t: when the first event of the last process
    came.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.end_offset = 0
        self._reset()

    def _reset(self) -> None:
        self.history = RunHistory()
        self.last_step_event: event_types.StepCompleted | None = None
        self.process_started_t: float | None = None
        self.training_started = self.caught_up = False
        self.stages: dict[str, RunStage] = {}
        self.stages_done: list[str] = []
        self.notes: deque[str] = deque(maxlen=MAX_NOTES)
        self._recent: deque[tuple[int, float]] = deque(maxlen=SPEED_WINDOW_STEPS)
        self.loss_curve = LossCurve()

    @property
    def step(self) -> int:
        started = self.history.start_event
        return (
            self.last_step_event.step
            if self.last_step_event
            else started.resumed_step
            if started
            else 0
        )

    @property
    def total_steps(self) -> int | None:
        started = self.history.start_event
        return (
            self.last_step_event.total
            if self.last_step_event
            else started.total_steps
            if started
            else None
        )

    @property
    def phase(self) -> Phase:
        """Of the last process, while it lives."""
        return (
            "running"
            if self.training_started
            else "caching"
            if self.stages or self.stages_done
            else "starting"
        )

    @property
    def left_s(self) -> float | None:
        """By the clock over the recent steps, so that pictures and checkpoints between them count."""
        if self.last_step_event is None or self.total_steps is None or not self._recent:
            return None
        (first, began), (last, now) = self._recent[0], self._recent[-1]
        steady = last > first and now > began  # else the clock was set back
        each = (now - began) / (last - first) if steady else self.last_step_event.seconds
        return max(0.0, each * (self.total_steps - last))

    @property
    def best_step(self) -> int | None:
        """Where the held-out loss was lowest."""
        return max((e.step for e in self.history.evaluations.values() if e.best), default=None)

    @property
    def latest_image_path(self) -> str | None:
        newest = max(self.history.images.values(), key=lambda one: one.step, default=None)
        return newest.path if newest else None

    def read_new_events(self, deadline: float = float("inf")) -> None:
        """Take in what was added; `complete` when all was before the deadline (of time.monotonic)."""
        self.caught_up = False
        while not self.caught_up and time.monotonic() < deadline:
            part = log_reader.read_lines(self._path, self.end_offset)
            if part.start < self.end_offset:
                self._reset()
            self.end_offset = part.end
            self._add_lines(part.lines)
            self.caught_up = not part.has_more

    def _add_lines(self, lines: list[bytes]) -> None:
        steps = [place for place, line in enumerate(lines) if STEP_MARKER in line[:64]]
        stride = max(1, len(steps) // MAX_SAMPLED_STEPS)
        passed = set(steps[:-SPEED_WINDOW_STEPS]) - set(steps[::stride])
        for place, line in enumerate(lines):
            if place not in passed and (found := log_reader.parse_record(line)) is not None:
                self._add_record(found)

    def _add_record(self, found: dict[str, Any]) -> None:
        event, t = event_from_dict(found), float(found["t"])
        if event is None:
            return
        if self.process_started_t is None or self._is_new_process(event):
            self.process_started_t, self.training_started, self.history.end_event = t, False, None
            self.stages, self.stages_done = {}, []
        if isinstance(event, event_types.StepCompleted):
            self._add_step(event, t)
            return
        self.history.add_record(EventRecord(t, event, self.end_offset))
        self._apply_event(event)

    def _is_new_process(self, event: event_types.Event) -> bool:
        """A process first scans its datasets; a forerunner that was killed has not said that it ended."""
        return isinstance(event, event_types.StageStarted) and (
            self.history.end_event is not None or (self.training_started and event.stage == "scan")
        )

    def _add_step(self, event: event_types.StepCompleted, t: float) -> None:
        self.last_step_event, self.history.last_event_time = event, t
        self.stages.clear()
        self._recent.append((event.step, t))
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
                self._recent.clear()
                self.last_step_event = None
            case event_types.NoticeIssued(message=message):
                self.notes.append(message)
            case event_types.RunFinished() | event_types.RunFailed():
                self.stages.clear()
