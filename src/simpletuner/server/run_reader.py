"""The reader of a run folder: everything that the server shows of a run comes from here.

A training appends to events.jsonl and train.log while the server reads them, and either file can be
replaced when a run is started from scratch. Two rules keep all views consistent. Offsets always are
at the end of a complete line (or character), so nothing is read twice or in half. And a chunk that
starts at 0 after a request for a later offset means that the file is another one: the view built
from it must be discarded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from simpletuner.server import file_reader
from simpletuner.server.event_summary import EventSummary
from simpletuner.server.file_reader import LineChunk, read_json_object
from simpletuner.server.job_states import Phase
from simpletuner.server.run_metrics import MetricsTable
from simpletuner.server.run_tables import TableReader
from simpletuner.server.sampling_previews import RUN_PREVIEW_FILE, preview_version
from simpletuner.server.schemas.runs import LogPart, RunMetrics, RunTables
from simpletuner.server.step_rows import StepRows

Rows = TypeVar("Rows", bound=StepRows[Any])


class FileStamp(NamedTuple):
    """The identity and version of a file."""

    inode: int
    size: int
    mtime_ns: int


class EventCursor:
    """A position in an events.jsonl that grows, and that can be replaced by a new file."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    def read(self, limit: int | None = None) -> tuple[LineChunk, bool]:
        """Return the next lines, and True if the file was replaced and older lines are void."""
        chunk = file_reader.read_lines(self.path, self.offset, limit)
        was_replaced = chunk.start < self.offset
        self.offset = chunk.end
        return chunk, was_replaced

    def read_all(self) -> Iterator[tuple[LineChunk, bool]]:
        """Yield chunks up to the present end of the file."""
        while True:
            chunk, was_replaced = self.read()
            yield chunk, was_replaced
            if not chunk.has_more:
                return


class RunReader:
    """Reads one run folder.

    `refresh` follows the files incrementally and updates the attributes: summary (from the events),
    exit_record (the content of exit.json), is_locked (a process is working in the folder),
    stop_requested, and revision, which counts the calls that found a change. The other methods read
    on request and do not change the object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.summary = EventSummary()
        self.exit_record: dict[str, Any] | None = None
        self.is_locked = False
        self.revision = 0
        self._events = EventCursor(path / "events.jsonl")
        self._events_caught_up = False
        self._stamps: dict[str, FileStamp | None] = {}

    @property
    def events_end(self) -> int:
        """The byte offset up to which the summary includes the events."""
        return self._events.offset

    @property
    def is_read(self) -> bool:
        """True if the summary includes all events that there were at the last refresh."""
        return self._events_caught_up

    @property
    def exit_t(self) -> float | None:
        """The time in exit.json, in unix seconds."""
        t = self.exit_record.get("t") if self.exit_record else None
        return float(t) if isinstance(t, (int, float)) else None

    @property
    def stop_requested(self) -> bool:
        return self._stamps.get("control/stop") is not None

    @property
    def phase(self) -> Phase:
        """The phase of the live process.

        Every process writes run.lock when it starts, so older events belong to the process before
        it.
        """
        lock = self._stamps.get("run.lock")
        last_event_ns = self.summary.history.last_event_time * 1e9
        return self.summary.phase if lock is None or last_event_ns >= lock.mtime_ns else "starting"

    def last_changed_ns(self) -> int:
        """Return the modification time of events.jsonl, 0 if it does not exist."""
        stamp = _file_stamp(self._events.path)
        return stamp.mtime_ns if stamp else 0

    def refresh(self, deadline: float = float("inf")) -> None:
        """Read what has changed since the last call, events until `deadline` (of time.monotonic).

        The lock is only tried if it was held before or if a file has changed: a training that
        starts at the very moment of the trial would find the folder locked.
        """
        before = self._stamps
        was_locked = self.is_locked
        names = ("events.jsonl", "exit.json", "run.lock", "control/stop")
        stamps = {name: _file_stamp(self.path / name) for name in names}
        changed = {name for name in names if stamps[name] != before.get(name)}
        if "exit.json" in changed:
            self.exit_record = read_json_object(self.path / "exit.json")
        if stamps["exit.json"] is not None:
            self.is_locked = False
        elif self.is_locked or changed - {"control/stop"}:
            self.is_locked = file_reader.is_locked(self.path / "run.lock")
        if "events.jsonl" in changed or not self._events_caught_up:
            self._read_new_events(deadline)
        self._stamps = stamps
        self.revision += bool(changed) or self.is_locked != was_locked

    def _read_new_events(self, deadline: float) -> None:
        self._events_caught_up = False
        while not self._events_caught_up and time.monotonic() < deadline:
            chunk, was_replaced = self._events.read()
            self.revision += 1
            if was_replaced:
                self.summary = EventSummary()
            self.summary.add_lines(chunk.lines, chunk.end)
            self._events_caught_up = not chunk.has_more

    def preview_version(self) -> int | None:
        """Return the version of the preview of images that are being sampled, None without one.

        A preview that is older than the process is one that a killed process has left.
        """
        version = preview_version(self.path / RUN_PREVIEW_FILE) if self.is_locked else None
        lock = self._stamps.get("run.lock")
        is_older = version is not None and lock is not None and version < lock.mtime_ns // 1_000_000
        return None if is_older else version

    def config(self) -> dict[str, Any]:
        """Return the content of config.json, {} if there is none."""
        return read_json_object(self.path / "config.json") or {}

    def metrics(self, max_points: int) -> RunMetrics:
        """Return the metrics of all steps, downsampled to `max_points`."""
        table, end = self._read_steps(MetricsTable)
        return table.to_message(max_points, end)

    def tables(self) -> RunTables:
        """Return the tables of epochs and of held-out losses."""
        return self._read_steps(TableReader)[0].tables()

    def _read_steps(self, make: Callable[[], Rows]) -> tuple[Rows, int]:
        """Return the rows of all steps, and the byte offset up to which they were read."""
        cursor = EventCursor(self._events.path)
        rows = make()
        for chunk, was_replaced in cursor.read_all():
            if was_replaced:
                rows = make()
            rows.add_lines(chunk.lines, chunk.end)
        return rows, cursor.offset

    def events(self, since: int, limit: int) -> tuple[list[dict[str, Any]], int, int]:
        """Return at most `limit` records from byte `since`, and their start and end bytes."""
        chunk, _ = EventCursor(self._events.path, since).read(limit)
        records = [record for line in chunk.lines if (record := file_reader.parse_record(line))]
        return records, chunk.start, chunk.end

    def log(self, since: int, limit: int) -> LogPart:
        """Return at most `limit` bytes of train.log from byte `since`, negative from the end."""
        return file_reader.read_log_part(self.path / "train.log", since, limit)


def _file_stamp(path: Path) -> FileStamp | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return FileStamp(status.st_ino, status.st_size, status.st_mtime_ns)
