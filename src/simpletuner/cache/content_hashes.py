"""What a file contains, as a hash: two names of one picture share an entry, a changed one gets another."""

from __future__ import annotations

import hashlib
from pathlib import Path

from simpletuner.cache.sqlite_index import SqliteIndex
from simpletuner.errors import CacheError
from simpletuner.events.event_types import Emit
from simpletuner.events.sinks import null_emit

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, sha256 TEXT NOT NULL
) WITHOUT ROWID;
"""


class ContentHashes:
    """SHA-256 of files, remembered by (path, size, mtime_ns, inode). May be used from many threads.

    folder: where `content.sqlite` lies. read_files: how many were not remembered.
    """

    def __init__(self, folder: Path, emit: Emit = null_emit) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"cannot make the cache folder {folder}: {error.strerror}") from error
        self._index = SqliteIndex(
            folder / "content.sqlite", SCHEMA, emit, "every picture is read once more"
        )
        self.hashed_files = 0

    def hash_file(self, path: Path) -> str:
        """Hex digest. OSError when the file cannot be read."""
        name = (
            str(path.absolute()).encode("utf-8", "surrogateescape").hex()
        )  # any bytes may be a POSIX name
        before = path.stat()
        stamp = (before.st_size, before.st_mtime_ns, before.st_ino)
        rows = self._index.query(
            "SELECT size, mtime_ns, inode, sha256 FROM files WHERE path = ?", (name,)
        )
        if rows and rows[0][:3] == stamp:
            return str(rows[0][3])
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        after = path.stat()
        with self._index.transaction() as index:
            self.hashed_files += 1
            if (
                after.st_size,
                after.st_mtime_ns,
                after.st_ino,
            ) == stamp:  # else it changed while being read
                row = (name, *stamp, digest.hexdigest())
                index.execute("INSERT OR REPLACE INTO files VALUES (?,?,?,?,?)", row)
        return digest.hexdigest()

    def close(self) -> None:
        self._index.close()
