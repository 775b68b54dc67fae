"""A SQLite file used as an index whose content can always be rebuilt."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simpletuner.errors import CacheError, DiskFull
from simpletuner.events.event_types import Emit, WarningIssued


class SqliteIndex:
    """Shared by threads and processes; every failure is a CacheError or DiskFull with the path.

    A file that is not a database is renamed to `*.damaged` and replaced by an empty one.
    rebuild_note: the end of that warning, which describes how the content is rebuilt.
    """

    def __init__(self, path: Path, schema: str, emit: Emit, rebuild_note: str) -> None:
        self._path = path
        self._lock = threading.RLock()
        try:
            self._connection = _open_database(path, schema)
        except sqlite3.OperationalError as error:
            raise CacheError(f"cannot open {path}: {error}") from error
        except sqlite3.DatabaseError as error:
            self._set_aside()
            emit(WarningIssued(f"{path} is damaged ({error}); {rebuild_note}"))
            self._connection = _open_database(path, schema)

    def query(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        with self._lock, self._translate_errors():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run statements that take effect all together or not at all."""
        with self._lock, self._translate_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise DiskFull(f"no disk space left for {self._path}: {error}") from error
            raise CacheError(f"cannot use {self._path}: {error}") from error
        except sqlite3.DatabaseError as error:
            self._set_aside()
            raise CacheError(
                f"{self._path} is damaged ({error}). It was renamed to *.damaged; run the same"
                " command again to rebuild it."
            ) from error

    def _set_aside(self) -> None:
        if self._path.exists():  # otherwise another thread has already renamed it
            self._path.replace(self._path.with_name(f"{self._path.name}.damaged"))
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)


def _open_database(path: Path, schema: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:  # network file systems have no shared memory for it
            connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(schema)
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection
