"""Who hears of an event: one Emit in front of many sinks, none of which can stop the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from simpletuner.events.event_types import (
    CheckpointSetAside,
    Emit,
    Event,
    RunFailed,
    StageProgress,
    StepCompleted,
    WarningIssued,
)

Sink = Callable[[Event], None]


class CloseableSink(Protocol):
    """A sink that holds something open: a file, a thread, a connection."""

    def __call__(self, event: Event, /) -> None: ...

    def close(self) -> None: ...


LOG_LEVELS = {"debug": 10, "info": 20, "warning": 30}


def event_level(event: Event) -> int:
    """How much an event matters to a person; the keys of LEVELS are what log_level offers."""
    if isinstance(event, (WarningIssued, RunFailed, CheckpointSetAside)):
        return LOG_LEVELS["warning"]
    return (
        LOG_LEVELS["debug"]
        if isinstance(event, (StageProgress, StepCompleted))
        else LOG_LEVELS["info"]
    )


def null_emit(event: Event) -> None:
    """The Emit of code that nobody listens to."""


def fan_out(sinks: Sequence[Sink]) -> Emit:
    """One Emit for all sinks, safe to call from several threads.

    A sink that raises is dropped, and the others hear of it once as a Warned event.
    """
    listening = list(sinks)
    lock = threading.RLock()

    def emit(event: Event) -> None:
        with lock:
            failed = [
                (sink, why) for sink in listening if (why := call_and_catch(partial(sink, event)))
            ]
            for sink, _ in failed:
                listening.remove(sink)
            for sink, why in failed:
                emit(WarningIssued(f"{_sink_name(sink)} is switched off: {why}"))

    return emit


def close_all_sinks(sinks: Sequence[CloseableSink]) -> list[str]:
    """Close every one; what went wrong is returned, one line each."""
    failures = [(sink, call_and_catch(sink.close)) for sink in sinks]
    return [f"{_sink_name(sink)} did not close: {why}" for sink, why in failures if why]


def call_and_catch(action: Callable[[], object]) -> str:
    """Act; what went wrong in one line, empty when nothing did. For what may never end a run."""
    try:
        action()
    except Exception as error:  # outer edge: no tracker's failure may end a run
        return f"{type(error).__name__}: {error}"
    return ""


def _sink_name(sink: Sink) -> str:
    return type(sink).__name__.removesuffix("Sink")
