"""What a file contains, as a hash: two names of one picture share an entry, a changed one gets another."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from pathlib import Path

from simpletuner.cache.store import open_index
from simpletuner.errors import CacheError
from simpletuner.events.sinks import silent
from simpletuner.events.types import Emit, Warned

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, sha256 TEXT NOT NULL
) WITHOUT ROWID;
"""


class ContentHashes:
    """SHA-256 of files, remembered by (path, size, mtime_ns, inode). May be used from many threads.

    folder: where `content.sqlite` lies; a damaged one is thrown away, since it only saves reading.
    """

    def __init__(self, folder: Path, emit: Emit = silent) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "content.sqlite"
        try:
            self._index = open_index(path, SCHEMA)
        except sqlite3.OperationalError as error:
            raise CacheError(f"cannot open {path}: {error}") from error
        except sqlite3.DatabaseError as error:
            emit(Warned(f"{path} is damaged ({error}) and is made anew"))
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._index = open_index(path, SCHEMA)
        self._lock = threading.Lock()
        self.read_files = 0

    def of(self, path: Path) -> str:
        """Hex digest. OSError when the file cannot be read."""
        name = str(path.absolute()).encode("utf-8", "surrogateescape").hex()  # any bytes may be a POSIX name
        before = path.stat()
        stamp = (before.st_size, before.st_mtime_ns, before.st_ino)
        with self._lock:
            row = self._index.execute(
                "SELECT size, mtime_ns, inode, sha256 FROM files WHERE path = ?", (name,)
            ).fetchone()
        if row is not None and row[:3] == stamp:
            return str(row[3])
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        after = path.stat()
        with self._lock:
            self.read_files += 1
            if (after.st_size, after.st_mtime_ns, after.st_ino) == stamp:  # else it changed while being read
                row = (name, *stamp, digest.hexdigest())
                self._index.execute("INSERT OR REPLACE INTO files VALUES (?,?,?,?,?)", row)
        return digest.hexdigest()

    def close(self) -> None:
        self._index.close()
