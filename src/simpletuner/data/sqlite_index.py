"""A SQLite file used as an index whose content can always be rebuilt."""

from __future__ import annotations

import sqlite3
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from simpletuner.errors import CacheError, DiskFull
from simpletuner.events.event_types import Emit, WarningIssued

Result = TypeVar("Result")
# The module decodes names in a damaged schema, and fails before it raises an error of its own.
DATABASE_ERRORS = (sqlite3.Error, UnicodeDecodeError, OverflowError)
# Messages of SQLite that are about the disk or about other processes. Every other message means
# that the file does not hold what was written: also "no such column", after a damaged schema.
NO_DAMAGE = ("locked", "full", "unable to open", "readonly", "disk I/O error")


def row_checksum(*values: object) -> int:
    """Return a checksum that is stored with a row, so that a damaged row is recognized."""
    return zlib.crc32(repr(values).encode("utf-8", "surrogatepass"))


class SqliteIndex:
    """Shared by threads and processes; every failure is a CacheError or DiskFull with the path.

    A damaged file is renamed to `*.damaged` with a warning and replaced by an empty one, whenever
    the damage is found; then `rebuild` is called, if there is one, and the operation that found it
    is repeated. A file of another `version` is emptied without a warning. rebuild_note: the end of
    the warning, which describes how the content is rebuilt.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        version: int,
        emit: Emit,
        rebuild_note: str,
        rebuild: Callable[[], None] | None = None,
    ) -> None:
        self._path = path
        self._schema = schema
        self._version = version
        self._emit = emit
        self._rebuild_note = rebuild_note
        self._rebuild = rebuild
        self._rebuilding = False
        self._lock = threading.RLock()
        try:
            self._connection = _open_database(path, schema, version)
        except DATABASE_ERRORS as error:
            self._raise_unless_damaged(error)
            self._set_aside(str(error))

    def query(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        return self._run(lambda: self._connection.execute(query, values).fetchall())

    def transaction(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run statements that take effect all together or not at all, and return the result."""

        def attempt() -> Result:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(self._connection)
                self._connection.execute("COMMIT")
                return result
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

        return self._run(attempt)

    def replace_damaged(self, reason: str) -> None:
        """Set the file aside because its content was found to be wrong, and rebuild it.

        Raises CacheError if that happens again while it is rebuilt.
        """
        with self._lock:
            if self._rebuilding:
                raise CacheError(f"{self._path} is damaged again ({reason}); check the disk")
            self._rebuilding = True
            try:
                with suppress(*DATABASE_ERRORS):
                    self._connection.close()
                self._set_aside(reason)
                if self._rebuild is not None:
                    self._rebuild()
            finally:
                self._rebuilding = False

    def close(self) -> None:
        with suppress(*DATABASE_ERRORS):  # a checkpoint of a damaged log is not needed
            self._connection.close()

    def _run(self, attempt: Callable[[], Result]) -> Result:
        with self._lock:
            try:
                return attempt()
            except DATABASE_ERRORS as error:
                self._raise_unless_damaged(error)
                self.replace_damaged(str(error))
            try:
                return attempt()
            except DATABASE_ERRORS as error:
                raise CacheError(f"cannot use {self._path}: {error}") from error

    def _raise_unless_damaged(self, error: Exception) -> None:
        if "full" in str(error):
            raise DiskFull(f"no disk space left for {self._path}: {error}") from error
        if isinstance(error, sqlite3.OperationalError) and any(
            words in str(error) for words in NO_DAMAGE
        ):
            raise CacheError(f"cannot use {self._path}: {error}") from error

    def _set_aside(self, reason: str) -> None:
        try:
            if self._path.exists():  # otherwise another process has already renamed it
                self._path.replace(self._path.with_name(f"{self._path.name}.damaged"))
            for suffix in ("-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            self._connection = _open_database(self._path, self._schema, self._version)
        except (OSError, *DATABASE_ERRORS) as error:
            raise CacheError(f"cannot replace the damaged {self._path}: {error}") from error
        self._emit(WarningIssued(f"{self._path} is damaged ({reason}); {self._rebuild_note}"))


def _open_database(path: Path, schema: str, version: int) -> sqlite3.Connection:
    """Open the file and check its structure; the check reads it once, 0.3 s per million rows."""
    connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:  # network file systems have no shared memory for it
            connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA synchronous=NORMAL")
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        if connection.execute("PRAGMA user_version").fetchone()[0] != version:
            _empty(connection)
            connection.execute(f"PRAGMA user_version = {version}")
        connection.executescript(schema)
    except DATABASE_ERRORS:
        connection.close()
        raise
    return connection


def _empty(connection: sqlite3.Connection) -> None:
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (name,) in rows:
        quoted = str(name).replace('"', '""')
        connection.execute(f'DROP TABLE IF EXISTS "{quoted}"')
