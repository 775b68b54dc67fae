"""The event log `events.jsonl`: one line per event, append-only.

Everything else about a run can be rebuilt from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from simpletuner.bounded_files import open_regular_file
from simpletuner.events.event_types import EVENT_CLASSES, Event, RunWorld

MAX_PENDING_BYTES = 8 << 20


@dataclass(frozen=True)
class EventRecord:
    """A line of the log. end_offset: bytes up to its end, for read_events(since=...)."""

    unix_time: float
    event: Event
    end_offset: int


def event_to_dict(event: Event, t: float) -> dict[str, Any]:
    """Return the object of one line. Numbers that are not finite become null, as JSON requires."""
    return {"t": round(t, 3), "kind": event.kind, **_replace_nonfinite(dataclasses.asdict(event))}


def event_from_dict(record: dict[str, Any]) -> Event | None:
    """Return the event of a line; None if another version wrote its kind or fields."""
    kind = EVENT_CLASSES.get(record.get("kind", ""))
    if kind is None:
        return None
    values: dict[str, Any] = {}
    for field, has_type in _checked_fields_by_kind()[kind.kind]:
        if field.name in record:
            value = record[field.name]
            if field.name == "world":
                value = _world_from_json(value)
            elif value is None and field.type == "float":
                value = math.nan
            elif isinstance(value, (dict, list)):
                value = _lists_to_tuples(value)
            if not has_type(value):
                return None
            values[field.name] = value
        elif field.default is dataclasses.MISSING:
            return None
    return kind(**values)


@cache
def _checked_fields_by_kind() -> dict[
    str, tuple[tuple[dataclasses.Field[Any], Callable[[Any], bool]], ...]
]:
    """Return kind -> the fields of its class, each with the check of a value read from JSON.

    The checks are made once: a server reads the logs of all runs.
    """
    checked = {}
    for kind, event in EVENT_CLASSES.items():
        types = get_type_hints(event)
        checked[kind] = tuple(
            (field, _make_type_check(types[field.name])) for field in dataclasses.fields(event)
        )
    return checked


def _make_type_check(wanted: Any) -> Callable[[Any], bool]:
    """Return a function that says whether a value read from JSON has the type of a field."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    checks = [_make_type_check(item) for item in arguments if item is not Ellipsis]
    if origin in (Union, UnionType):
        return lambda value: any(check(value) for check in checks)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return lambda value: isinstance(value, tuple) and all(map(checks[0], value))
    if origin is tuple:
        return lambda value: (
            isinstance(value, tuple)
            and len(value) == len(checks)
            and all(check(item) for check, item in zip(checks, value))
        )
    if origin is dict:
        return lambda value: (
            isinstance(value, dict)
            and all(isinstance(key, str) and checks[1](item) for key, item in value.items())
        )
    if wanted is float:
        return lambda value: type(value) in (int, float)
    return lambda value: type(value) is wanted


class EventLog:
    """Sink that appends to the file; each line is written in one call, so that it is never torn.

    When a write fails, as on a full disk, append raises OSError, and the next call writes what is
    missing before its own line; up to MAX_PENDING_BYTES are remembered.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._pending = b""
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")  # the last process was killed in the middle of a line

    def append(self, event: Event) -> None:
        line = json.dumps(event_to_dict(event, time.time()), ensure_ascii=False, allow_nan=False)
        with self._lock:
            if len(self._pending) < MAX_PENDING_BYTES:
                self._pending += line.encode("utf-8", "backslashreplace") + b"\n"
            while self._pending:
                self._pending = self._pending[os.write(self._handle, self._pending) :]

    __call__ = append

    def close(self) -> None:
        with self._lock:
            os.close(self._handle)


def read_events(path: Path, since: int = 0) -> Iterator[EventRecord]:
    """Yield the events from byte offset `since`. Incomplete and unknown lines are skipped."""
    if not path.exists():
        return
    with open_regular_file(path) as file:
        file.seek(since)
        end = since
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                record = json.loads(line)
                event, t = event_from_dict(record), float(record["t"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            if event is not None:
                yield EventRecord(t, event, end)


def count_damaged_lines(path: Path) -> int:
    """Return how many lines hold no event; those that another version wrote do not count."""
    if not path.exists():
        return 0
    damaged = 0
    with open_regular_file(path) as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                known = record["kind"] in EVENT_CLASSES
                damaged += known and event_from_dict(record) is None
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
    return damaged


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_nonfinite(item) for item in value]
    return value


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    return tuple(_lists_to_tuples(item) for item in value) if isinstance(value, list) else value


def _world_from_json(value: Any) -> RunWorld | None:
    """Return the processes of a run; None for one process, and where another version wrote them."""
    match value:
        case {
            "processes": int(processes),
            "mode": str(mode),
            "base_bytes_per_rank": int(base_bytes_per_rank),
        }:
            return RunWorld(processes, mode, base_bytes_per_rank)
    return None
