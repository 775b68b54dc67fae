"""index.sqlite: the queue's order and flags, and what ended jobs came to. It may be deleted at any time.

Order and flags lie in queue.json too, ends in the folders of the jobs: everything here can be made again.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simpletuner.durable import write_atomically
from simpletuner.server.tail import document
from simpletuner.server.wire.jobs import Job

# Another set of fields, or of tables, is another index.
VERSION = zlib.crc32(",".join((*Job.model_fields, "kept")).encode()) >> 1
BUSY_S = 5.0
ORDER = "order"  # beside the jobs, whose ids are hexadecimal
WRITE = "INSERT OR REPLACE INTO kept VALUES (?, ?)"
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

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Order:
        jobs = tuple(job for job in kept.get("jobs", ()) if isinstance(job, str))
        return cls(jobs, kept.get("paused") is True, kept.get("continue_on_error") is True)

    def json(self) -> str:
        return json.dumps(asdict(self))


class Index:
    """One connection, one writer at a time; opened when first asked, made anew when damaged."""

    def __init__(self, folder: Path) -> None:
        self.path, self.second = folder / "index.sqlite", folder / "queue.json"
        self._lock = threading.RLock()
        self._opened: sqlite3.Connection | None = None

    def order(self) -> Order:
        found = self._do("SELECT json FROM kept WHERE name = ?", ORDER)
        return Order.of(json.loads(found[0][0])) if found else Order()

    def write_order(self, order: Order) -> None:
        """The file first: it is what a damaged index is made of."""
        with self._lock:
            write_atomically(self.second, order.json() + "\n")
            self._do(WRITE, ORDER, order.json())

    def ended(self) -> dict[str, str]:
        """Id -> summary as JSON."""
        return dict(self._do("SELECT name, json FROM kept WHERE name != ?", ORDER))

    def write_ended(self, job: str, summary: str) -> None:
        self._do(WRITE, job, summary)

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def _do(self, statement: str, *values: str) -> list[Any]:
        with self._lock:
            try:
                return self._connection().execute(statement, values).fetchall()
            except sqlite3.DatabaseError as error:
                self._renew(error)
                return self._connection().execute(statement, values).fetchall()

    def _connection(self) -> sqlite3.Connection:
        if self._opened is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._opened = sqlite3.connect(
                self.path, timeout=BUSY_S, check_same_thread=False, isolation_level=None
            )
            self._opened.execute(f"PRAGMA journal_mode={journal_mode(self.path.parent)}")
            self._opened.execute("PRAGMA synchronous=NORMAL")
            (version,) = self._opened.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"index of version {version}")
            self._opened.execute(
                "CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, json TEXT NOT NULL) STRICT"
            )
            self._opened.execute(f"PRAGMA user_version = {VERSION}")
            kept = document(self.second)
            if kept is not None:
                self._opened.execute(WRITE, (ORDER, Order.of(kept).json()))
        return self._opened

    def _renew(self, error: sqlite3.DatabaseError) -> None:
        """Raises what is no damage: a disk that is full, or another process that writes for too long."""
        if any(word in str(error) for word in ("locked", "is full")):
            raise error
        self.close()
        for end in ("", "-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)
