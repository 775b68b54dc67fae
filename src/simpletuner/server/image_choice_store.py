"""Images that users leave out or crop on the pages, in .simpletuner/image_choices.json by folder.

The files of a dataset stay as they are. A job gets the choices in the fields `exclude` and
`crop_boxes` of its datasets when it is queued.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.data.geometry import CropBox
from simpletuner.data.image_choices import read_crop_boxes
from simpletuner.errors import ConfigError
from simpletuner.server.watched_file import WatchedJsonFile
from simpletuner.server.workspace import Workspace

FILE_NAME = "image_choices.json"
_WRITE_LOCK = threading.Lock()  # all stores of a process write the same file


@dataclass(frozen=True)
class FolderChoices:
    """The choices about one folder. Paths are those of the images inside it."""

    excluded: frozenset[str] = frozenset()
    boxes: Mapping[str, CropBox] = field(default_factory=dict)

    def to_fields(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a dataset with these choices added to its own."""
        fields: dict[str, Any] = {}
        if self.excluded:
            own = entry.get("exclude")
            fields["exclude"] = sorted({*self.excluded, *(own if isinstance(own, list) else ())})
        if self.boxes:
            own = entry.get("crop_boxes")
            boxes = {name: list(box) for name, box in sorted(self.boxes.items())}
            fields["crop_boxes"] = {**boxes, **(own if isinstance(own, dict) else {})}
        return fields


NO_CHOICES = FolderChoices()


class ImageChoiceStore:
    """The choices of a workspace. Nothing is held in memory but the last file that was read."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._file = WatchedJsonFile(workspace.server_dir / FILE_NAME, _parse)

    def of(self, folder: Path) -> FolderChoices:
        """Return the choices about a folder, which is resolved."""
        return self._file.read().get(self._key(folder), NO_CHOICES)

    def exclude(self, folder: Path, files: Iterable[str], excluded: bool) -> None:
        """Leave images out, or use them again."""
        with _WRITE_LOCK:
            before = self.of(folder)
            names = before.excluded | set(files) if excluded else before.excluded - set(files)
            self._write(folder, FolderChoices(names, before.boxes))

    def set_box(self, folder: Path, file: str, box: CropBox | None) -> None:
        """Use a part of an image, or the whole image again."""
        with _WRITE_LOCK:
            before = self.of(folder)
            boxes = {name: old for name, old in before.boxes.items() if name != file}
            if box is not None:
                boxes[file] = box
            self._write(folder, FolderChoices(before.excluded, boxes))

    def move(self, folder: Path, target: Path) -> None:
        """Take over the choices when a folder is renamed."""
        with _WRITE_LOCK:
            choices = self.of(folder)
            self._write(folder, NO_CHOICES)
            self._write(target, choices)

    def forget(self, folder: Path) -> None:
        """Remove the choices about a folder that is created again."""
        with _WRITE_LOCK:
            if self.of(folder) != NO_CHOICES:
                self._write(folder, NO_CHOICES)

    def _key(self, folder: Path) -> str:
        """Return the path relative to the workspace, so that a workspace can be moved."""
        root = self._workspace.root
        return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)

    def _write(self, folder: Path, choices: FolderChoices) -> None:
        content = {
            key: entry for key, entry in self._file.read().items() if key != self._key(folder)
        } | {self._key(folder): choices}
        rows = {
            key: {"exclude": sorted(entry.excluded), "crop_boxes": entry.boxes}
            for key, entry in content.items()
            if entry.excluded or entry.boxes
        }
        self._file.write(rows)


def _parse(row: Any) -> FolderChoices:
    """Return the choices of one folder; what another program wrote wrongly is left out."""
    content = row if isinstance(row, dict) else {}
    names, boxes = content.get("exclude"), content.get("crop_boxes")
    excluded = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    valid: dict[str, CropBox] = {}
    for name, box in boxes.items() if isinstance(boxes, dict) else ():
        try:
            valid |= read_crop_boxes({name: box})
        except ConfigError:
            continue
    return FolderChoices(frozenset(excluded), valid)
