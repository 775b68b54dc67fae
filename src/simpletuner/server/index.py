"""index.sqlite: the queue's order and flags, and what ended jobs came to. It may be deleted at any time.

Order and flags lie in queue.json too, ends in the folders of the jobs: everything here can be made again.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from simpletuner.server.atomic import write_atomically
from simpletuner.server.tail import document
from simpletuner.server.wire.jobs import Job

# Another set of fields is another index.
VERSION = zlib.crc32(",".join(Job.model_fields).encode()) >> 1
BUSY_S = 5.0
T = TypeVar("T")
TABLES = """
CREATE TABLE IF NOT EXISTS waiting (place INTEGER PRIMARY KEY, job TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS flags (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS ended (job TEXT PRIMARY KEY, summary TEXT NOT NULL) STRICT;
"""
# Write-ahead logging needs memory that all processes share: wrong on network disks, and on unknown ones.
LOCAL_DISKS = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"))


def journal_mode(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """WAL on a local disk, DELETE elsewhere and where the system does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "DELETE"
    kinds = {}
    for line in lines:
        left, _, right = line.partition(" - ")
        kinds[left.split()[4].replace("\\040", " ")] = right.split()[0]
    real = Path(os.path.realpath(folder))
    kind = next((kinds[str(place)] for place in (real, *real.parents) if str(place) in kinds), "")
    return "WAL" if kind in LOCAL_DISKS else "DELETE"


@dataclass(frozen=True)
class Order:
    """jobs: ids of those that wait, in their order."""

    jobs: tuple[str, ...] = ()
    paused: bool = False
    continue_on_error: bool = False


def fill(index: sqlite3.Connection, order: Order) -> None:
    flags = (("paused", order.paused), ("continue_on_error", order.continue_on_error))
    with index:
        index.execute("DELETE FROM waiting")
        index.executemany("INSERT INTO waiting VALUES (?, ?)", enumerate(order.jobs))
        index.executemany("INSERT OR REPLACE INTO flags VALUES (?, ?)", flags)


class Index:
    """One connection, one writer at a time; opened when first asked, made anew when damaged."""

    def __init__(self, folder: Path) -> None:
        self.path, self.second = folder / "index.sqlite", folder / "queue.json"
        self._lock = threading.RLock()
        self._opened: sqlite3.Connection | None = None

    def order(self) -> Order:
        def read(index: sqlite3.Connection) -> Order:
            jobs = tuple(job for (job,) in index.execute("SELECT job FROM waiting ORDER BY place"))
            return Order(
                jobs, **{name: bool(on) for name, on in index.execute("SELECT name, value FROM flags")}
            )

        return self._do(read)

    def write_order(self, order: Order) -> None:
        """The file first: it is what a damaged index is made of."""
        with self._lock:
            write_atomically(self.second, json.dumps(asdict(order)) + "\n")
            self._do(lambda index: fill(index, order))

    def ended(self) -> dict[str, str]:
        """Id -> summary as JSON."""
        return dict(self._do(lambda index: index.execute("SELECT job, summary FROM ended").fetchall()))

    def write_ended(self, job: str, summary: str) -> None:
        def write(index: sqlite3.Connection) -> None:
            with index:
                index.execute("INSERT OR REPLACE INTO ended VALUES (?, ?)", (job, summary))

        self._do(write)

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def _do(self, act: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            try:
                return act(self._connection())
            except sqlite3.DatabaseError as error:
                self._renew(error)
                return act(self._connection())

    def _connection(self) -> sqlite3.Connection:
        if self._opened is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._opened = sqlite3.connect(self.path, timeout=BUSY_S, check_same_thread=False)
            self._opened.execute(f"PRAGMA journal_mode={journal_mode(self.path.parent)}")
            self._opened.execute("PRAGMA synchronous=NORMAL")
            (version,) = self._opened.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"index of version {version}")
            with self._opened as transaction:
                transaction.executescript(f"{TABLES} PRAGMA user_version = {VERSION};")
            kept = document(self.second)
            if kept is not None:
                jobs = tuple(job for job in kept.get("jobs", []) if isinstance(job, str))
                flags = (kept.get(name) is True for name in ("paused", "continue_on_error"))
                fill(self._opened, Order(jobs, *flags))
        return self._opened

    def _renew(self, error: sqlite3.DatabaseError) -> None:
        """Raises what is no damage: a disk that is full, or another process that writes for too long."""
        if any(word in str(error) for word in ("locked", "is full")):
            raise error
        self.close()
        for end in ("", "-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)
