"""Where run folders are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.server.place import Place

DEPTH = 3  # levels below an allowed folder
MOST_FOLDERS = 5000  # after output/, which is looked through first
SCAN_EVERY_S = 2.0
SETTLED_NS = 2_000_000_000  # clocks of file systems are coarse: what is younger is read again
NO_RUNS_IN = frozenset({"datasets", "node_modules", "images", "cache", "control"})
NO_RUNS_IN_PREFIXES = (".", "checkpoint-", "earlier-", "damaged-")

Listing = tuple[int, list[str], bool]  # time of the folder's last change, folders in it, is it a run


@dataclass
class Folders:
    """Looks for run folders; a folder that has not changed is not read again."""

    place: Place
    _known: dict[str, Listing] = field(default_factory=dict)
    _due: float = 0.0
    _found: list[Path] = field(default_factory=list)

    def runs(self) -> list[Path]:
        if time.monotonic() >= self._due:
            before, self._known = self._known, {}
            first = [] if self.place.outputs.is_symlink() else [(self.place.outputs, DEPTH - 1)]
            places = [*first, *((root, DEPTH) for root in self.place.allowed)]
            self._found = [
                Path(path) for root, depth in places for path in self._walk(str(root), depth, before)
            ]
            self._due = time.monotonic() + SCAN_EVERY_S
        return self._found

    def _walk(self, folder: str, depth: int, before: Mapping[str, Listing]) -> Iterator[str]:
        if folder in self._known or len(self._known) >= MOST_FOLDERS:
            return
        try:
            changed = os.stat(folder, follow_symlinks=False).st_mtime_ns
            kept = before.get(folder)
            settled = changed < time.time_ns() - SETTLED_NS
            entry = kept if kept and kept[0] == changed and settled else (changed, *self._read(folder))
        except OSError:
            return
        self._known[folder] = entry
        if entry[2]:
            yield folder
        if depth:
            for name in entry[1]:
                yield from self._walk(os.path.join(folder, name), depth - 1, before)

    def _read(self, folder: str) -> tuple[list[str], bool]:
        with os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        below = [
            name
            for name, is_folder in names.items()
            if is_folder and name not in NO_RUNS_IN and not name.startswith(NO_RUNS_IN_PREFIXES)
        ]
        return sorted(below), "events.jsonl" in names or {"config.json", "run.lock"} <= names.keys()
