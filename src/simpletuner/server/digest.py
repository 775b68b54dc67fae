"""What the events of a run came to, kept up to date by reading only what was added.

Of many steps at once only some are looked at: 25,000 cost 25 ms, and the list of runs shows no single one.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

from simpletuner.events import types
from simpletuner.events.history import History
from simpletuner.events.log import Record, from_record
from simpletuner.events.wording import Smooth
from simpletuner.server import tail
from simpletuner.server.wire.runs import Stage

Phase = Literal["starting", "caching", "running"]
STEP = b'"kind": "step"'
LOOKED_AT = 256  # steps of one reading, besides the last ones
RECENT = 50  # steps that the speed is taken from
POINTS = 60
NOTES = 200
SMOOTHING = 0.3


class Curve:
    """Mean losses of at most POINTS stretches of equal length, which doubles when they become too many."""

    def __init__(self) -> None:
        self._width = 1
        self._sums: dict[int, tuple[float, int]] = {}

    def add(self, step: int, loss: float) -> None:
        if loss != loss:
            return
        self._put((step - 1) // self._width, loss, 1)
        while len(self._sums) > POINTS:
            self._width *= 2
            old, self._sums = self._sums, {}
            for place, (total, count) in old.items():
                self._put(place // 2, total, count)

    def _put(self, place: int, total: float, count: int) -> None:
        before, seen = self._sums.get(place, (0.0, 0))
        self._sums[place] = (before + total, seen + count)

    def forget_after(self, step: int) -> None:
        self._sums = {place: kept for place, kept in self._sums.items() if place * self._width < step}

    def points(self) -> list[float]:
        smooth = Smooth(SMOOTHING)
        return [float(f"{smooth(total / count):.4g}") for _, (total, count) in sorted(self._sums.items())]


class Digest:
    """history: all but the steps. curve: their losses. process_t: when the first event of the last process
    came.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.end = 0
        self._forget()

    def _forget(self) -> None:
        self.history = History()
        self.last: types.Stepped | None = None
        self.process_t: float | None = None
        self.begun = self.complete = False
        self.stages: dict[str, Stage] = {}
        self.stages_done: list[str] = []
        self.notes: deque[str] = deque(maxlen=NOTES)
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self.curve = Curve()

    @property
    def step(self) -> int:
        started = self.history.started
        return self.last.step if self.last else started.resumed_step if started else 0

    @property
    def total(self) -> int | None:
        started = self.history.started
        return self.last.total if self.last else started.total_steps if started else None

    @property
    def phase(self) -> Phase:
        """Of the last process, while it lives."""
        return "running" if self.begun else "caching" if self.stages or self.stages_done else "starting"

    @property
    def left_s(self) -> float | None:
        """By the clock over the recent steps, so that pictures and checkpoints between them count."""
        if self.last is None or self.total is None or not self._recent:
            return None
        (first, began), (last, now) = self._recent[0], self._recent[-1]
        steady = last > first and now > began  # else the clock was set back
        each = (now - began) / (last - first) if steady else self.last.seconds
        return max(0.0, each * (self.total - last))

    @property
    def best_step(self) -> int | None:
        """Where the held-out loss was lowest."""
        return max((e.step for e in self.history.evaluations.values() if e.best), default=None)

    @property
    def picture(self) -> str | None:
        newest = max(self.history.pictures.values(), key=lambda one: one.step, default=None)
        return newest.path if newest else None

    def read(self, deadline: float = float("inf")) -> None:
        """Take in what was added; `complete` when all was before the deadline (of time.monotonic)."""
        self.complete = False
        while not self.complete and time.monotonic() < deadline:
            part = tail.lines(self._path, self.end)
            if part.start < self.end:
                self._forget()
            self.end = part.end
            self._take(part.lines)
            self.complete = not part.more

    def _take(self, lines: list[bytes]) -> None:
        steps = [place for place, line in enumerate(lines) if STEP in line[:64]]
        stride = max(1, len(steps) // LOOKED_AT)
        passed = set(steps[:-RECENT]) - set(steps[::stride])
        for place, line in enumerate(lines):
            if place not in passed and (found := tail.record(line)) is not None:
                self._add(found)

    def _add(self, found: dict[str, Any]) -> None:
        event, t = from_record(found), float(found["t"])
        if event is None:
            return
        if self.process_t is None or self._another_process(event):
            self.process_t, self.begun, self.history.end = t, False, None
            self.stages, self.stages_done = {}, []
        if isinstance(event, types.Stepped):
            self._stepped(event, t)
            return
        self.history.add(Record(t, event, self.end))
        self._follow(event)

    def _another_process(self, event: types.Event) -> bool:
        """A process first scans its datasets; a forerunner that was killed has not said that it ended."""
        return isinstance(event, types.StageStarted) and (
            self.history.end is not None or (self.begun and event.stage == "scan")
        )

    def _stepped(self, event: types.Stepped, t: float) -> None:
        self.last, self.history.last_t = event, t
        self.stages.clear()
        self._recent.append((event.step, t))
        self.curve.add(event.step, event.loss)

    def _follow(self, event: types.Event) -> None:
        match event:
            case types.StageStarted(stage=name):
                self.stages[name] = Stage(stage=name, done=0, total=event.total, unit=event.unit, left_s=None)
            case types.StageProgress(stage=name):
                unit = self.stages[name].unit if name in self.stages else ""
                self.stages[name] = Stage(
                    stage=name, done=event.done, total=event.total, unit=unit, left_s=event.left_s
                )
            case types.StageDone(stage=name):
                self.stages.pop(name, None)
                if name not in self.stages_done:
                    self.stages_done.append(name)
            case types.RunStarted(resumed_step=step) | types.Resumed(step=step):
                self.begun = True
                self.curve.forget_after(step)
                self._recent.clear()
                self.last = None
            case types.Noted(message=message):
                self.notes.append(message)
            case types.Finished() | types.Failed():
                self.stages.clear()
