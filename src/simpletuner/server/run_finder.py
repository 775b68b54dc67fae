"""The search for run folders in the workspace and the other allowed folders."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from simpletuner.server.workspace import Workspace

SEARCH_DEPTH = 3  # levels below an allowed folder
MAX_FOLDERS = 5000  # folders visited per search, which begins with output/
RESCAN_INTERVAL_S = 2.0
# File systems have coarse clocks: a folder that changed this recently is listed again.
CLOCK_MARGIN_NS = 2_000_000_000
SKIPPED_FOLDERS = frozenset({"datasets", "node_modules", "images", "cache", "control"})
SKIPPED_PREFIXES = (".", "checkpoint-", "earlier-", "damaged-")


class FolderScan(NamedTuple):
    """The listing of a folder, valid as long as its modification time stays the same."""

    mtime_ns: int
    subfolders: list[str]
    is_run: bool


@dataclass
class RunFinder:
    """Finds run folders. A folder that has not changed is not listed again."""

    workspace: Workspace
    _scans: dict[str, FolderScan] = field(default_factory=dict)
    _due: float = 0.0
    _run_folders: list[Path] = field(default_factory=list)

    def find_run_folders(self) -> list[Path]:
        """Return the run folders; the search is repeated after RESCAN_INTERVAL_S."""
        if time.monotonic() >= self._due:
            before = self._scans
            self._scans = {}
            starts = [(root, SEARCH_DEPTH) for root in self.workspace.allowed_roots]
            if not self.workspace.output_dir.is_symlink():
                starts.insert(0, (self.workspace.output_dir, SEARCH_DEPTH - 1))
            self._run_folders = [
                Path(path)
                for root, depth in starts
                for path in self._walk(str(root), depth, before)
            ]
            self._due = time.monotonic() + RESCAN_INTERVAL_S
        return self._run_folders

    def _walk(self, folder: str, depth: int, before: Mapping[str, FolderScan]) -> Iterator[str]:
        if folder in self._scans or len(self._scans) >= MAX_FOLDERS:
            return
        try:
            mtime_ns = os.stat(folder, follow_symlinks=False).st_mtime_ns
            scan = before.get(folder)
            is_settled = mtime_ns < time.time_ns() - CLOCK_MARGIN_NS
            if scan is None or scan.mtime_ns != mtime_ns or not is_settled:
                scan = FolderScan(mtime_ns, *self._list_folder(folder))
        except OSError:
            return
        self._scans[folder] = scan
        if scan.is_run:
            yield folder
        if depth:
            for name in scan.subfolders:
                yield from self._walk(os.path.join(folder, name), depth - 1, before)

    def _list_folder(self, folder: str) -> tuple[list[str], bool]:
        with os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        subfolders = [
            name
            for name, is_folder in names.items()
            if is_folder and name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)
        ]
        is_run = "events.jsonl" in names or {"config.json", "run.lock"} <= names.keys()
        return sorted(subfolders), is_run
