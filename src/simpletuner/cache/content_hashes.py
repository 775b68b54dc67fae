"""Content hashes of files: copies of an image share a cache entry, a changed image gets another."""

from __future__ import annotations

import hashlib
from pathlib import Path

from simpletuner.cache.sqlite_index import SqliteIndex
from simpletuner.data.sources import SourceFile
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
            folder / "content.sqlite", SCHEMA, emit, "every image is read and hashed again"
        )
        self.hashed_files = 0

    def hash_file(self, file: SourceFile) -> str:
        """Return the hex digest. Raises OSError when the file cannot be read."""
        name = file.cache_key
        stamp = file.stamp()
        rows = self._index.query(
            "SELECT size, mtime_ns, inode, sha256 FROM files WHERE path = ?", (name,)
        )
        if rows and rows[0][:3] == stamp:
            return str(rows[0][3])
        digest = hashlib.sha256()
        with file.open() as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        unchanged = file.stamp() == stamp
        with self._index.transaction() as index:
            self.hashed_files += 1
            if unchanged:  # a file that changed while it was read is not remembered
                row = (name, *stamp, digest.hexdigest())
                index.execute("INSERT OR REPLACE INTO files VALUES (?,?,?,?,?)", row)
        return digest.hexdigest()

    def close(self) -> None:
        self._index.close()
