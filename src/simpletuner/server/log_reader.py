"""Files that grow: what was added behind a byte offset, never half a line or half a character.

Links are not followed: a run folder may hold one that leads anywhere.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from simpletuner.server.schemas.runs import LogPart

MAX_READ_BYTES = 1 << 20  # read at once
MAX_JSON_BYTES = 1 << 24  # of a document, which is read whole
OPTIONAL_NUMBER = (int, float, type(None))
FIELD_TYPES: Mapping[str, Any] = MappingProxyType(
    dict.fromkeys(
        ("t", "total", "done", "loss", "seconds", "learning_rate", "left_s"), OPTIONAL_NUMBER
    )
    | dict.fromkeys(("step", "total_steps", "resumed_step", "seed", "width_px", "height_px"), int)
    | dict.fromkeys(
        ("kind", "message", "stage", "unit", "path", "prompt", "prompt_id", "weights"), str
    )
    | dict.fromkeys(("model", "device", "split", "metric", "dataset"), str)
)  # of fields that are shown as they are
JSON_DECODER = json.JSONDecoder(parse_constant=lambda word: None)


@dataclass(frozen=True)
class LineChunk:
    """Whole lines from byte `start` to `end`. start: 0 where the file is not the one that was asked about.
    more: whether as much again may wait behind them.
    """

    start: int
    end: int
    lines: list[bytes]
    has_more: bool = False


@contextmanager
def open_regular_file(path: Path) -> Iterator[BinaryIO | None]:
    """An ordinary file to read, None where there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        yield None
        return
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        yield None
        return
    with os.fdopen(handle, "rb") as file:
        yield file


def read_lines(path: Path, since: int, most: int | None = None) -> LineChunk:
    """Lines from byte `since` on, at most `most` of them; all anew when no line begins there any more."""
    with open_regular_file(path) as file:
        if file is None:
            return LineChunk(0, 0, [])
        start = since if 0 < since <= os.fstat(file.fileno()).st_size else 0
        if start:
            file.seek(start - 1)
            if file.read(1) != b"\n":  # another file than the one that was asked about
                file.seek(start := 0)
        data = file.read(MAX_READ_BYTES)
    whole = data[: data.rfind(b"\n") + 1]
    found = whole.split(b"\n")[:-1]
    if most is not None and len(found) > most:
        found = found[:most]
        return LineChunk(start, start + sum(map(len, found)) + most, found, has_more=True)
    return LineChunk(
        start, start + len(whole), found, has_more=len(data) == MAX_READ_BYTES and bool(whole)
    )


def parse_record(line: bytes) -> dict[str, Any] | None:
    """A line of events.jsonl, free of what JSON or UTF-8 cannot hold; None for what is torn or no record."""
    try:
        found = JSON_DECODER.decode(line.decode("utf-8", "replace"))
        if b"\\ud" in line:  # half a character, out of a file name that is not UTF-8
            found = json.loads(replace_surrogates(json.dumps(found, ensure_ascii=False)))
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or "kind" not in found or found.get("t") is None:
        return None
    sound = all(
        isinstance(value, FIELD_TYPES[name]) for name, value in found.items() if name in FIELD_TYPES
    )
    return found if sound else None


def read_log_part(path: Path, since: int, limit: int) -> LogPart:
    """At most `limit` bytes from `since` on; negative: so many before the end; behind the end: all anew."""
    with open_regular_file(path) as file:
        if file is None:
            return LogPart(text="", start=0, end=0, size=0)
        size = os.fstat(file.fileno()).st_size
        start = max(0, size + since) if since < 0 else since if since <= size else 0
        file.seek(start)
        data = file.read(limit)
    skipped = 0
    while (
        start and skipped < min(3, len(data)) and data[skipped] & 0xC0 == 0x80
    ):  # inside a character
        skipped += 1
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = decoder.decode(data[skipped:])
    end = start + len(data) - len(decoder.getstate()[0])
    return LogPart(text=found, start=start + skipped, end=end, size=size)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """A JSON object in a file of its own; None where there is none that can be read."""
    with open_regular_file(path) as file:
        data = file.read(MAX_JSON_BYTES) if file else b""
    try:
        found = json.loads(replace_surrogates(data.decode("utf-8", "replace")))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def replace_surrogates(words: str) -> str:
    """What UTF-8 can hold of it."""
    return words.encode("utf-8", "replace").decode()
