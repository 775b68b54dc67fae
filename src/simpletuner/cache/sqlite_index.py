"""A SQLite file that only saves work: what it says can be found again, so a damaged one is made anew."""

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
    """Shared by threads and processes. Every failure is a CacheError (or DiskFull) that names the file.

    A file that is no database is set aside (`*.damaged`); `refill` tells what takes its place.
    """

    def __init__(self, path: Path, schema: str, emit: Emit, refill: str) -> None:
        self._path, self._lock = path, threading.RLock()
        try:
            self._connection = _open_database(path, schema)
        except sqlite3.OperationalError as error:
            raise CacheError(f"cannot open {path}: {error}") from error
        except sqlite3.DatabaseError as error:
            self._set_aside()
            emit(WarningIssued(f"{path} is damaged ({error}); {refill}"))
            self._connection = _open_database(path, schema)

    def query(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        with self._lock, self._translate_errors():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is executed inside, or nothing of it."""
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
                raise DiskFull(f"no room for {self._path}: {error}") from error
            raise CacheError(f"cannot use {self._path}: {error}") from error
        except sqlite3.DatabaseError as error:
            self._set_aside()
            raise CacheError(
                f"{self._path} is damaged ({error}). It was set aside; start the same command again."
            ) from error

    def _set_aside(self) -> None:
        if self._path.exists():  # otherwise another thread was here first
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
