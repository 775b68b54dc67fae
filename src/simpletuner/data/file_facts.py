"""Index of files that are slow to read: hash, header, failures, contents of archives.

A row is valid for one stamp of its file. The index is a file of the cache folder and can be deleted
between runs; then everything is read again.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.data.sources import SourceFile
from simpletuner.data.sqlite_index import SqliteIndex, row_checksum
from simpletuner.events.event_types import Emit

INDEX_NAME = "sources.sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (
  file TEXT PRIMARY KEY, stamp TEXT NOT NULL, content TEXT NOT NULL, checksum INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (
  file TEXT PRIMARY KEY, stamp TEXT NOT NULL, detail TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contents (
  file TEXT, part INTEGER, stamp TEXT NOT NULL, content BLOB NOT NULL, checksum INTEGER NOT NULL,
  PRIMARY KEY (file, part)
) WITHOUT ROWID;
"""
SCHEMA_VERSION = 1
QUERY_ROWS = 500  # SQLite takes at most 999 values in one query


@dataclass(frozen=True)
class FileFacts:
    """Facts that need the content of an image. size_px: upright."""

    sha256: str
    size_bytes: int
    size_px: tuple[int, int]
    mode: str
    is_animated: bool
    has_alpha: bool


class FileFactsIndex:
    """Facts by file. May be used by several threads and processes."""

    def __init__(self, folder: Path, emit: Emit) -> None:
        self._index = SqliteIndex(
            folder / INDEX_NAME, SCHEMA, SCHEMA_VERSION, emit, "every file is read again"
        )

    def find_facts(self, files: Sequence[SourceFile]) -> dict[SourceFile, FileFacts]:
        """Return what is remembered of the files; damaged rows count as missing."""
        facts: dict[SourceFile, FileFacts] = {}
        for start in range(0, len(files), QUERY_ROWS):
            by_key = {file.cache_key: file for file in files[start : start + QUERY_ROWS]}
            marks = ",".join("?" * len(by_key))
            query = f"SELECT file, stamp, content, checksum FROM facts WHERE file IN ({marks})"
            for key, stamp, content, checksum in self._index.query(query, tuple(by_key)):
                if checksum != row_checksum(key, stamp, content):
                    continue
                if stamp == _stamp_text(by_key[key]):
                    values = json.loads(content)
                    values[2] = tuple(values[2])
                    facts[by_key[key]] = FileFacts(*values)
        return facts

    def remember_facts(self, facts: Mapping[SourceFile, FileFacts]) -> None:
        rows = []
        for file, fact in facts.items():
            values = (
                fact.sha256,
                fact.size_bytes,
                fact.size_px,
                fact.mode,
                fact.is_animated,
                fact.has_alpha,
            )
            row = (file.cache_key, _stamp_text(file), json.dumps(values))
            rows.append((*row, row_checksum(*row)))
        self._write("INSERT OR REPLACE INTO facts VALUES (?,?,?,?)", rows)

    def find_failure(self, file: SourceFile) -> str:
        """Return why the file could not be read in an earlier start, or ""."""
        query = "SELECT detail FROM failures WHERE file = ? AND stamp = ?"
        rows = self._index.query(query, (file.cache_key, _stamp_text(file)))
        return str(rows[0][0]) if rows else ""

    def remember_failures(self, failures: Mapping[SourceFile, str]) -> None:
        rows = [(file.cache_key, _stamp_text(file), why) for file, why in failures.items()]
        self._write("INSERT OR REPLACE INTO failures VALUES (?,?,?)", rows)

    def find_parts(self, key: str, stamp: str) -> list[Any]:
        """Return the remembered parts of a listing or of an archive, in order."""
        query = (
            "SELECT part, stamp, content, checksum FROM contents WHERE file = ? AND stamp = ? "
            "ORDER BY part"
        )
        parts: list[Any] = []
        for part, found_stamp, content, checksum in self._index.query(query, (key, stamp)):
            if part != len(parts) or checksum != row_checksum(key, part, found_stamp, content):
                break  # the parts before the damage are a beginning that can be continued
            parts.append(json.loads(zlib.decompress(content)))
        return parts

    def remember_part(self, key: str, part: int, stamp: str, content: Any) -> None:
        packed = zlib.compress(json.dumps(content).encode(), 1)
        row = (key, part, stamp, packed)
        self._write(
            "INSERT OR REPLACE INTO contents VALUES (?,?,?,?,?)", [(*row, row_checksum(*row))]
        )

    def forget_parts(self, key: str) -> None:
        self._write("DELETE FROM contents WHERE file = ?", [(key,)])

    def rename_parts(self, key: str, new_key: str) -> None:
        """Replace the parts of `new_key` by those of `key`, all at once."""

        def replace(index: sqlite3.Connection) -> None:
            index.execute("DELETE FROM contents WHERE file = ?", (new_key,))
            parts = index.execute(
                "SELECT part, stamp, content FROM contents WHERE file = ?", (key,)
            ).fetchall()
            rows = [(new_key, *part, row_checksum(new_key, *part)) for part in parts]
            index.executemany("INSERT INTO contents VALUES (?,?,?,?,?)", rows)
            index.execute("DELETE FROM contents WHERE file = ?", (key,))

        self._index.transaction(replace)

    def close(self) -> None:
        self._index.close()

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            self._index.transaction(lambda index: index.executemany(statement, rows))


def _stamp_text(file: SourceFile) -> str:
    return ",".join(map(str, file.stamp()))
