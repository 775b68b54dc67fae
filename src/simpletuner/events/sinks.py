"""Who hears of an event: one Emit in front of many sinks, none of which can stop the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from simpletuner.events.types import CheckpointSetAside, Emit, Event, Failed, StageProgress, Stepped, Warned

Sink = Callable[[Event], None]


class ClosingSink(Protocol):
    """A sink that holds something open: a file, a thread, a connection."""

    def __call__(self, event: Event, /) -> None: ...

    def close(self) -> None: ...


LEVELS = {"debug": 10, "info": 20, "warning": 30}


def level_of(event: Event) -> int:
    """How much an event matters to a person; the keys of LEVELS are what log_level offers."""
    if isinstance(event, (Warned, Failed, CheckpointSetAside)):
        return LEVELS["warning"]
    return LEVELS["debug"] if isinstance(event, (StageProgress, Stepped)) else LEVELS["info"]


def silent(event: Event) -> None:
    """The Emit of code that nobody listens to."""


def fan_out(sinks: Sequence[Sink]) -> Emit:
    """One Emit for all sinks, safe to call from several threads.

    A sink that raises is dropped, and the others hear of it once as a Warned event.
    """
    listening = list(sinks)
    lock = threading.RLock()

    def emit(event: Event) -> None:
        with lock:
            failed = [(sink, why) for sink in listening if (why := failure_of(partial(sink, event)))]
            for sink, _ in failed:
                listening.remove(sink)
            for sink, why in failed:
                emit(Warned(f"{_name(sink)} is switched off: {why}"))

    return emit


def close_all(sinks: Sequence[ClosingSink]) -> list[str]:
    """Close every one; what went wrong is returned, one line each."""
    failures = [(sink, failure_of(sink.close)) for sink in sinks]
    return [f"{_name(sink)} did not close: {why}" for sink, why in failures if why]


def failure_of(action: Callable[[], object]) -> str:
    """Act; what went wrong in one line, empty when nothing did. For what may never end a run."""
    try:
        action()
    except Exception as error:  # outer edge: no tracker's failure may end a run
        return f"{type(error).__name__}: {error}"
    return ""


def _name(sink: Sink) -> str:
    return type(sink).__name__
