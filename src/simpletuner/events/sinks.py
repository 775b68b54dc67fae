"""Who hears of an event: one Emit in front of many sinks, none of which can stop the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from simpletuner.events.types import CheckpointSetAside, Emit, Event, Failed, StageProgress, Stepped, Warned

Sink = Callable[[Event], None]

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
            failed = []
            for sink in list(listening):
                try:
                    sink(event)
                except Exception as error:  # outer edge: no tracker's failure may end a run
                    listening.remove(sink)
                    failed.append(f"{_name(sink)} is switched off: {type(error).__name__}: {error}")
            for message in failed:
                emit(Warned(message))

    return emit


def _name(sink: Sink) -> str:
    return type(sink).__name__ if not isinstance(sink, type(_name)) else sink.__name__
