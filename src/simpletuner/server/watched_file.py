"""A JSON file of the server's folder that is read again when it has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from simpletuner.atomic_io import write_atomically
from simpletuner.server.file_reader import read_json_object

Content = TypeVar("Content")


class WatchedJsonFile(Generic[Content]):
    """A JSON object by key. Another process may write the file, or remove it.

    parse: from the value of a key to what the program uses, None for what another version wrote.
    Whoever writes needs a lock of its own: an entry is changed by reading and writing all of them.
    """

    def __init__(self, path: Path, parse: Callable[[Any], Content | None]) -> None:
        self._path = path
        self._parse = parse
        self._stamp: tuple[int, int] | None = None
        self._entries: dict[str, Content] = {}

    def read(self) -> dict[str, Content]:
        """Return all entries, which the caller must not change; none where there is no file."""
        try:
            status = self._path.stat()
        except OSError:
            return {}
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            rows = (read_json_object(self._path) or {}).items()
            parsed = ((key, self._parse(value)) for key, value in rows)
            self._entries = {key: entry for key, entry in parsed if entry is not None}
            self._stamp = stamp
        return self._entries

    def write(self, values: dict[str, Any]) -> None:
        """Replace the file. values: the JSON value of each key."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
