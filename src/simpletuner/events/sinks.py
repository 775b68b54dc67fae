"""Delivery of events: one Emit in front of many sinks, none of which can stop the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from simpletuner.events.event_types import (
    CaptionFitMeasured,
    CheckpointSetAside,
    Emit,
    Event,
    PromptsChosen,
    RunFailed,
    SampleLossesMeasured,
    StageProgress,
    StepCompleted,
    WarningIssued,
)

Sink = Callable[[Event], None]


class CloseableSink(Protocol):
    """A sink that holds a file, a thread or a connection open."""

    def __call__(self, event: Event, /) -> None: ...

    def close(self) -> None: ...


LOG_LEVELS = {"debug": 10, "info": 20, "warning": 30}


def event_level(event: Event) -> int:
    """Return the log level of an event, one of the values of LOG_LEVELS."""
    if isinstance(event, (WarningIssued, RunFailed, CheckpointSetAside)):
        return LOG_LEVELS["warning"]
    is_detail = (
        isinstance(event, (StageProgress, StepCompleted))
        or (isinstance(event, SampleLossesMeasured) and not event.resisting)
        or (isinstance(event, CaptionFitMeasured) and not event.unfit)
        or (isinstance(event, PromptsChosen) and not event.edited)
    )
    return LOG_LEVELS["debug"] if is_detail else LOG_LEVELS["info"]


def null_emit(event: Event) -> None:
    """Emit nothing: the default of code without a listener."""


def fan_out(sinks: Sequence[Sink], never_removed: Sequence[Sink] = ()) -> Emit:
    """Return one Emit for all sinks, safe to call from several threads.

    A sink that raises is removed, and the others receive one WarningIssued about it. Those of
    `never_removed`, which must be among the sinks, are tried again with every event; the warning is
    given once for each series of failures.
    """
    listening = list(sinks)
    failing: list[Sink] = []
    lock = threading.RLock()

    def emit(event: Event) -> None:
        with lock:
            failed = [
                (sink, why) for sink in listening if (why := call_and_catch(partial(sink, event)))
            ]
            broken = [sink for sink, _ in failed]
            reported = list(failing)
            failing[:] = [sink for sink in broken if sink in never_removed]
            listening[:] = [
                sink for sink in listening if sink not in broken or sink in never_removed
            ]
            for sink, why in failed:
                if sink not in never_removed:
                    emit(WarningIssued(f"{_sink_name(sink)} is switched off: {why}"))
                elif sink not in reported:
                    emit(WarningIssued(f"{_sink_name(sink)} failed and is tried again: {why}"))

    return emit


def close_all_sinks(sinks: Sequence[CloseableSink]) -> list[str]:
    """Close every sink and return the failures, one line each."""
    failures = [(sink, call_and_catch(sink.close)) for sink in sinks]
    return [f"{_sink_name(sink)} did not close: {why}" for sink, why in failures if why]


def call_and_catch(action: Callable[[], object]) -> str:
    """Call the action and return its failure in one line, or an empty text.

    For actions that may never stop a run.
    """
    try:
        action()
    except Exception as error:  # outer edge: a failing tracker must not stop a run
        return f"{type(error).__name__}: {error}"
    return ""


def _sink_name(sink: Sink) -> str:
    return type(sink).__name__.removesuffix("Sink")
