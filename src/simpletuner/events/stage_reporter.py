"""Progress of one stage: counts units, and emits rate and time left at a readable interval."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from simpletuner.events.event_types import Emit, StageCompleted, StageProgress, StageStarted

MIN_INTERVAL_S = 0.5


class StageReporter:
    """Context manager of one stage: `with StageReporter(emit, "encode images", 160, "images")`.

    Emits StageStarted, StageProgress at most every MIN_INTERVAL_S seconds, and StageCompleted
    unless the body raised. `summary` may be set meanwhile; it is the note of StageCompleted.
    advance() may be called from several threads.
    """

    def __init__(self, emit: Emit, name: str, total: int | None, unit: str) -> None:
        self._emit, self._name, self._total, self._unit = emit, name, total, unit
        self._lock = threading.Lock()
        self.done = 0
        self.summary = ""

    def __enter__(self) -> StageReporter:
        self._started = self._last_emitted = time.monotonic()
        self._emit(StageStarted(self._name, self._total, self._unit))
        return self

    def advance(self, count: int = 1) -> None:
        now = time.monotonic()
        with self._lock:
            self.done += count
            due = now - self._last_emitted >= MIN_INTERVAL_S
            if due:
                self._last_emitted = now
        if due:
            rate = self.done / max(now - self._started, 1e-9)
            left_s = (
                (self._total - self.done) / rate if self._total is not None and rate > 0 else None
            )
            self._emit(StageProgress(self._name, self.done, self._total, rate, left_s))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._emit(
                StageCompleted(
                    self._name, self.done, time.monotonic() - self._started, self.summary
                )
            )
