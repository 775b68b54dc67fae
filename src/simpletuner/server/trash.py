"""The trash of a workspace: what a user deletes is moved there and can be restored.

.simpletuner/trash/<id>/
    trash.json     what it was, and where each part of it was
    0, 1, ...      the parts: files and folders
Entries without a trash.json are older versions of captions, which nothing restores automatically.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpletuner.atomic_io import write_atomically
from simpletuner.server.api_errors import abort
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.schemas.library import TrashEntry, TrashKind
from simpletuner.server.workspace import Workspace

ENTRY_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
RECORD_NAME = "trash.json"


class Trash:
    """The folder .simpletuner/trash."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._folder = workspace.server_dir / "trash"

    def discard(
        self,
        kind: TrashKind,
        label: str,
        paths: Sequence[Path],
        extra: dict[str, Any] | None = None,
        copies: bool = False,
    ) -> TrashEntry:
        """Move files and folders to the trash as one entry.

        copies: copy the files instead, which are then going to be replaced; restoring replaces them
        again.

        extra: further content of the record, for the restoring service. The record is written
        first, so that a crash in between leaves an entry that restores what was moved. Raises
        ApiError 409 for a path on another file system, which only a copy could move.
        """
        folder = self._workspace.make_trash_folder()
        record: dict[str, Any] = {
            "kind": kind,
            "label": label,
            "deleted_t": time.time(),
            "paths": [str(path) for path in paths],
            "replaces": copies,
            **({"extra": extra} if extra else {}),
        }
        write_atomically(folder / RECORD_NAME, json.dumps(record, indent=1))
        for at, path in enumerate(paths):
            try:
                if copies:
                    shutil.copyfile(path, folder / str(at))
                else:
                    os.rename(path, folder / str(at))
            except FileNotFoundError:
                continue
            except OSError as error:
                self._put_back(folder, record)
                shutil.rmtree(folder)
                if error.errno != errno.EXDEV:
                    raise
                abort(409, f"{path.name} is on another disk than the workspace; delete it there")
        return self._read(folder) or abort(500, "the record of the trash was not written")

    def entries(self) -> list[TrashEntry]:
        """Return all entries that can be restored, the newest first."""
        if not self._folder.is_dir():
            return []
        records = (self._read(folder) for folder in self._folder.iterdir())
        return sorted((entry for entry in records if entry), key=lambda entry: -entry.deleted_t)

    def restore(self, id: str) -> tuple[TrashEntry, dict[str, Any]]:
        """Move an entry back; return it and its extra record.

        Raises ApiError: 404 for an unknown id, 409 if something has taken the place of a part.
        """
        folder, record = self._require(id)
        entry = self._read(folder) or abort(404, "there is no such entry in the trash")
        parts = self._parts(folder, record)
        replaces = record.get("replaces") is True
        taken = [] if replaces else [path for _, path in parts if os.path.lexists(path)]
        if taken:
            abort(409, f"{taken[0]} exists again; rename it before you restore this")
        self._put_back(folder, record)
        shutil.rmtree(folder)
        return entry, record.get("extra", {})

    def remove(self, id: str) -> None:
        """Delete an entry permanently. Raises ApiError 404 for an unknown id."""
        folder, _ = self._require(id)
        shutil.rmtree(folder)

    def empty(self) -> None:
        """Delete everything in the trash permanently."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _require(self, id: str) -> tuple[Path, dict[str, Any]]:
        folder = self._folder / id if ENTRY_ID.fullmatch(id) else None
        record = read_json_object(folder / RECORD_NAME) if folder is not None else None
        if folder is None or record is None:
            abort(404, "there is no such entry in the trash")
        return folder, record

    def _parts(self, folder: Path, record: dict[str, Any]) -> list[tuple[Path, Path]]:
        """Return (part in the trash, original path) of the parts that were moved.

        Raises PathOutsideWorkspace: the record could have been changed by hand.
        """
        pairs = [(folder / str(at), Path(path)) for at, path in enumerate(record.get("paths", ()))]
        for _, original in pairs:
            self._workspace.resolve(original.parent)
        return [(part, original) for part, original in pairs if os.path.lexists(part)]

    def _put_back(self, folder: Path, record: dict[str, Any]) -> None:
        for part, original in self._parts(folder, record):
            original.parent.mkdir(parents=True, exist_ok=True)
            os.rename(part, original)

    def _read(self, folder: Path) -> TrashEntry | None:
        record = read_json_object(folder / RECORD_NAME)
        if record is None or not ENTRY_ID.fullmatch(folder.name):
            return None
        try:
            return TrashEntry(
                id=folder.name,
                kind=record["kind"],
                label=record["label"],
                deleted_t=record["deleted_t"],
                size_bytes=folder_size(folder),
            )
        except (KeyError, ValueError):
            return None


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder; links are not followed."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total
