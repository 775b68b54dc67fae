"""Content hashes of files: copies of an image share a cache entry, a changed image gets another."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from simpletuner.data.duplicates import content_hash
from simpletuner.data.sources import SourceFile
from simpletuner.data.sqlite_index import SqliteIndex, row_checksum
from simpletuner.errors import CacheError
from simpletuner.events.event_types import Emit
from simpletuner.events.sinks import null_emit

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  path TEXT PRIMARY KEY, size INTEGER, ctime_ns INTEGER, inode INTEGER, sha256 TEXT NOT NULL,
  checksum INTEGER NOT NULL
) WITHOUT ROWID;
"""
SCHEMA_VERSION = 2


class ContentHashes:
    """SHA-256 of files, remembered by (path, size, ctime_ns, inode). May be used from many threads.

    The change time of a file (ctime) cannot be set by programs, unlike its modification time.

    folder: holds `content.sqlite`. hashed_files: how many files had to be read.
    """

    def __init__(self, folder: Path, emit: Emit = null_emit) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"cannot create the cache folder {folder} ({error.strerror}); set cache_dir to"
                " another folder"
            ) from error
        self._index = SqliteIndex(
            folder / "content.sqlite",
            SCHEMA,
            SCHEMA_VERSION,
            emit,
            "every image is read and hashed again",
        )
        self.hashed_files = 0

    def hash_file(self, file: SourceFile) -> str:
        """Return the hex digest. Raises OSError when the file cannot be read."""
        name = file.cache_key
        stamp = file.stamp()
        rows = self._index.query(
            "SELECT size, ctime_ns, inode, sha256, checksum FROM files WHERE path = ?", (name,)
        )
        # A damaged row is not believed; the file is hashed again and its row replaced.
        if rows and rows[0][:3] == stamp and rows[0][4] == row_checksum(name, *rows[0][:4]):
            return str(rows[0][3])
        digest = content_hash(file)
        unchanged = file.stamp() == stamp
        row = (name, *stamp, digest)

        def remember(index: sqlite3.Connection) -> None:
            self.hashed_files += 1
            if unchanged:  # a file that changed while it was read is not remembered
                values = (*row, row_checksum(*row))
                index.execute("INSERT OR REPLACE INTO files VALUES (?,?,?,?,?,?)", values)

        self._index.transaction(remember)
        return digest

    def close(self) -> None:
        self._index.close()
