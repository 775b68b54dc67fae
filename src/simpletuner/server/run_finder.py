"""Where run folders are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.server.workspace import Workspace

SEARCH_DEPTH = 3  # levels below an allowed folder
MAX_FOLDERS = 5000  # after output/, which is looked through first
RESCAN_INTERVAL_S = 2.0
CLOCK_MARGIN_NS = 2_000_000_000  # clocks of file systems are coarse: what is younger is read again
SKIPPED_FOLDERS = frozenset({"datasets", "node_modules", "images", "cache", "control"})
SKIPPED_PREFIXES = (".", "checkpoint-", "earlier-", "damaged-")

FolderScan = tuple[
    int, list[str], bool
]  # time of the folder's last change, folders in it, is it a run


@dataclass
class RunFinder:
    """Looks for run folders; a folder that has not changed is not read again."""

    workspace: Workspace
    _scans: dict[str, FolderScan] = field(default_factory=dict)
    _due: float = 0.0
    _run_folders: list[Path] = field(default_factory=list)

    def find_run_folders(self) -> list[Path]:
        if time.monotonic() >= self._due:
            before, self._scans = self._scans, {}
            first = (
                []
                if self.workspace.output_dir.is_symlink()
                else [(self.workspace.output_dir, SEARCH_DEPTH - 1)]
            )
            places = [*first, *((root, SEARCH_DEPTH) for root in self.workspace.allowed_roots)]
            self._run_folders = [
                Path(path)
                for root, depth in places
                for path in self._walk(str(root), depth, before)
            ]
            self._due = time.monotonic() + RESCAN_INTERVAL_S
        return self._run_folders

    def _walk(self, folder: str, depth: int, before: Mapping[str, FolderScan]) -> Iterator[str]:
        if folder in self._scans or len(self._scans) >= MAX_FOLDERS:
            return
        try:
            changed = os.stat(folder, follow_symlinks=False).st_mtime_ns
            kept = before.get(folder)
            settled = changed < time.time_ns() - CLOCK_MARGIN_NS
            entry = (
                kept
                if kept and kept[0] == changed and settled
                else (changed, *self._list_folder(folder))
            )
        except OSError:
            return
        self._scans[folder] = entry
        if entry[2]:
            yield folder
        if depth:
            for name in entry[1]:
                yield from self._walk(os.path.join(folder, name), depth - 1, before)

    def _list_folder(self, folder: str) -> tuple[list[str], bool]:
        with os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        below = [
            name
            for name, is_folder in names.items()
            if is_folder and name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)
        ]
        return sorted(below), "events.jsonl" in names or {"config.json", "run.lock"} <= names.keys()
