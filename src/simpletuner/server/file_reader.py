"""Safe reading of files that other processes write: JSON documents, growing logs, locks.

Growing files are read from a byte offset to the last complete line or character. Symbolic links are
not followed, because a link in a run folder could lead anywhere.
"""

from __future__ import annotations

import codecs
import fcntl
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

MAX_READ_BYTES = 1 << 20  # per read of a growing file
MAX_JSON_BYTES = 1 << 24  # of a JSON document, which is read as a whole
OPTIONAL_NUMBER = (int, float, type(None))
# Types of the event fields that the pages show without further checks.
FIELD_TYPES: Mapping[str, Any] = MappingProxyType(
    dict.fromkeys(
        ("t", "total", "done", "loss", "seconds", "learning_rate", "left_s"), OPTIONAL_NUMBER
    )
    | dict.fromkeys(("step", "total_steps", "resumed_step", "seed", "width_px", "height_px"), int)
    | dict.fromkeys(
        ("kind", "message", "stage", "unit", "path", "prompt", "prompt_id", "weights"), str
    )
    | dict.fromkeys(("model", "device", "split", "metric", "dataset"), str)
)
JSON_DECODER = json.JSONDecoder(
    parse_constant=lambda constant: None
)  # NaN and Infinity become None


@dataclass(frozen=True)
class LineChunk:
    """Complete lines from byte `start` to byte `end`.

    start: 0 if the file was replaced since the requested offset was valid. has_more: more lines may
    follow.
    """

    start: int
    end: int
    lines: list[bytes]
    has_more: bool = False


@contextmanager
def open_regular_file(path: Path) -> Iterator[BinaryIO | None]:
    """Open a regular file for reading; yield None if there is none."""
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


def is_locked(path: Path) -> bool:
    """Return True if a process holds the lock on this file.

    The file is neither created nor written.
    """
    with open_regular_file(path) as file:
        if file is None:
            return False
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def read_lines(path: Path, since: int, limit: int | None = None) -> LineChunk:
    """Return at most `limit` complete lines from byte `since`.

    Reading starts at 0 if no line starts at `since`, which shows that the file was replaced.
    """
    with open_regular_file(path) as file:
        if file is None:
            return LineChunk(0, 0, [])
        start = since if 0 < since <= os.fstat(file.fileno()).st_size else 0
        if start:
            file.seek(start - 1)
            if file.read(1) != b"\n":
                file.seek(start := 0)
        data = file.read(MAX_READ_BYTES)
    complete = data[: data.rfind(b"\n") + 1]
    lines = complete.split(b"\n")[:-1]
    if limit is not None and len(lines) > limit:
        lines = lines[:limit]
        return LineChunk(start, start + sum(map(len, lines)) + limit, lines, has_more=True)
    has_more = len(data) == MAX_READ_BYTES and bool(complete)
    return LineChunk(start, start + len(complete), lines, has_more)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Parse a line of events.jsonl; return None for an incomplete or invalid record.

    The result contains nothing that JSON or UTF-8 cannot represent.
    """
    try:
        record = JSON_DECODER.decode(line.decode("utf-8", "replace"))
        if b"\\ud" in line:  # an unpaired surrogate, from a file name that is not UTF-8
            record = json.loads(replace_surrogates(json.dumps(record, ensure_ascii=False)))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "kind" not in record or record.get("t") is None:
        return None
    is_valid = all(
        isinstance(value, FIELD_TYPES[name])
        for name, value in record.items()
        if name in FIELD_TYPES
    )
    return record if is_valid else None


def read_log_part(path: Path, since: int, limit: int) -> LogPart:
    """Return at most `limit` bytes of a text file from byte `since`, cut between characters.

    A negative `since` counts back from the end. Reading starts at 0 if `since` is beyond the end.
    """
    with open_regular_file(path) as file:
        if file is None:
            return LogPart(text="", start=0, end=0, size=0)
        size = os.fstat(file.fileno()).st_size
        start = max(0, size + since) if since < 0 else since if since <= size else 0
        file.seek(start)
        data = file.read(limit)
    skipped = 0
    if start:  # skip the rest of a character that begins before `start`
        while skipped < min(3, len(data)) and data[skipped] & 0xC0 == 0x80:
            skipped += 1
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data[skipped:])
    end = start + len(data) - len(decoder.getstate()[0])
    return LogPart(text=text, start=start + skipped, end=end, size=size)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file is missing or holds no object."""
    with open_regular_file(path) as file:
        data = file.read(MAX_JSON_BYTES) if file else b""
    try:
        value = json.loads(replace_surrogates(data.decode("utf-8", "replace")))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def replace_surrogates(text: str) -> str:
    """Replace unpaired surrogates, which UTF-8 cannot encode, by question marks."""
    return text.encode("utf-8", "replace").decode()
