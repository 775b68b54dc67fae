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

from simpletuner.atomic_io import write_atomically
from simpletuner.server.log_reader import read_json_object
from simpletuner.server.schemas.jobs import Job

# Another set of fields, or of tables, is another index.
SCHEMA_VERSION = zlib.crc32(",".join((*Job.model_fields, "kept")).encode()) >> 1
BUSY_TIMEOUT_S = 5.0
ORDER_KEY = "order"  # beside the jobs, whose ids are hexadecimal
UPSERT_SQL = "INSERT OR REPLACE INTO kept VALUES (?, ?)"
# Write-ahead logging needs memory that all processes share: wrong on network disks, and on unknown ones.
LOCAL_FILE_SYSTEMS = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay")
)


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
    return "WAL" if kind in LOCAL_FILE_SYSTEMS else "DELETE"


@dataclass(frozen=True)
class QueueOrder:
    """jobs: ids of those that wait, in their order."""

    jobs: tuple[str, ...] = ()
    paused: bool = False
    continue_on_error: bool = False

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> QueueOrder:
        jobs = tuple(job for job in kept.get("jobs", ()) if isinstance(job, str))
        return cls(jobs, kept.get("paused") is True, kept.get("continue_on_error") is True)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class JobIndex:
    """One connection, one writer at a time; opened when first asked, made anew when damaged."""

    def __init__(self, folder: Path) -> None:
        self.path, self.queue_path = folder / "index.sqlite", folder / "queue.json"
        self._lock = threading.RLock()
        self._open_connection: sqlite3.Connection | None = None

    def read_order(self) -> QueueOrder:
        found = self._execute("SELECT json FROM kept WHERE name = ?", ORDER_KEY)
        return QueueOrder.from_dict(json.loads(found[0][0])) if found else QueueOrder()

    def write_order(self, order: QueueOrder) -> None:
        """The file first: it is what a damaged index is made of."""
        with self._lock:
            write_atomically(self.queue_path, order.to_json() + "\n")
            self._execute(UPSERT_SQL, ORDER_KEY, order.to_json())

    def ended_jobs(self) -> dict[str, str]:
        """Id -> summary as JSON."""
        return dict(self._execute("SELECT name, json FROM kept WHERE name != ?", ORDER_KEY))

    def write_ended_job(self, job: str, summary: str) -> None:
        self._execute(UPSERT_SQL, job, summary)

    def close(self) -> None:
        with self._lock:
            if self._open_connection is not None:
                self._open_connection.close()
                self._open_connection = None

    def _execute(self, statement: str, *values: str) -> list[Any]:
        with self._lock:
            try:
                return self._connection().execute(statement, values).fetchall()
            except sqlite3.DatabaseError as error:
                self._rebuild(error)
                return self._connection().execute(statement, values).fetchall()

    def _connection(self) -> sqlite3.Connection:
        if self._open_connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open_connection = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None
            )
            self._open_connection.execute(f"PRAGMA journal_mode={journal_mode(self.path.parent)}")
            self._open_connection.execute("PRAGMA synchronous=NORMAL")
            (version,) = self._open_connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA_VERSION):
                raise sqlite3.DatabaseError(f"index of version {version}")
            self._open_connection.execute(
                "CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, json TEXT NOT NULL) STRICT"
            )
            self._open_connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            kept = read_json_object(self.queue_path)
            if kept is not None:
                self._open_connection.execute(
                    UPSERT_SQL, (ORDER_KEY, QueueOrder.from_dict(kept).to_json())
                )
        return self._open_connection

    def _rebuild(self, error: sqlite3.DatabaseError) -> None:
        """Raises what is no damage: a disk that is full, or another process that writes for too long."""
        if any(word in str(error) for word in ("locked", "is full")):
            raise error
        self.close()
        for end in ("", "-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)
