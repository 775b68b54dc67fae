"""An index of the images in a folder, read once and updated whenever it is used."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.atomic_io import write_atomically
from simpletuner.config.schema import DataOptions
from simpletuner.data.captions import read_captions
from simpletuner.data.crop_assignment import assign_bucket
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.data.image_files import ImageFile, find_image_files
from simpletuner.data.pixels import read_image_header
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sources import LocalFile
from simpletuner.errors import DataError
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.image_choice_store import NO_CHOICES, FolderChoices
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace

DEFAULT_OPTIONS = DataOptions()
HEADER_CACHE_KEY = f"headers up to {DEFAULT_OPTIONS.max_image_megapixels:g} megapixels"
# A change inside a file is noticed after this time; added and removed files are noticed at once.
RESCAN_AFTER_S = 10.0
NOT_SCHEDULED = float("inf")
NO_FILE = (0, 0)
SourceStamps = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image.

    stamps: mtime_ns and bytes of the image, then of its caption file, zeros for a missing file.
    size_px: after applying the EXIF rotation; (0, 0) if the header cannot be read. problem: why it
    cannot be trained on.
    """

    stamps: SourceStamps
    size_px: tuple[int, int]
    captions: tuple[str, ...]
    problem: str | None

    @property
    def status(self) -> str:
        """Return "refused", "captioned" or "uncaptioned"."""
        return (
            "refused"
            if self.problem is not None
            else "captioned"
            if self.captions
            else "uncaptioned"
        )


class ImageIndex:
    """The images of one folder. Each refresh reads a limited part of the changes. Thread-safe.

    header_cache_path: a JSON file with the image sizes, which saves reading the headers again in
    the next process. It can be deleted at any time.
    """

    def __init__(
        self, workspace: Workspace, name: str, folder: Path, header_cache_path: Path
    ) -> None:
        self.workspace = workspace
        self.folder = folder
        self.header_cache_path = header_cache_path
        self.dataset = DatasetConfig(name, "image", folder)
        self.images: dict[str, ImageFile] = {}
        self.rejected_names: dict[str, str] = {}
        self._rows: dict[str, ImageRow] = {}
        self._pending: list[str] = []
        self._headers: dict[str, list[int]] | None = None
        self._has_new_headers = False
        # Folder -> its mtime when it was listed; empty: not listed yet.
        self._folders: dict[str, int] = {}
        self._allowed_folders: set[str] = set()
        self.choices = NO_CHOICES
        self._due_t = NOT_SCHEDULED
        self._lock = threading.Lock()

    def refresh(self, wait_s: float) -> None:
        """List the files, then read new and changed ones until `wait_s` have passed.

        Raises DataError if the folder cannot be read.
        """
        deadline = time.monotonic() + wait_s
        if not self._lock.acquire(timeout=wait_s if self._folders else -1):
            return  # another thread is reading
        try:
            changed = any(_mtime_ns(folder) != mtime for folder, mtime in self._folders.items())
            if changed or not self._folders or time.monotonic() > self._due_t:
                self._scan_names()
            while self._pending and time.monotonic() < deadline:
                name = self._pending.pop()
                self._rows[name] = self._read_row(self.images[name])
            if not self._pending and self._due_t == NOT_SCHEDULED:
                self._due_t = time.monotonic() + RESCAN_AFTER_S
                self._save_headers()
        except OSError as error:
            raise DataError(f"{self.folder}: {error.strerror}") from error
        finally:
            self._lock.release()

    def apply_choices(self, choices: FolderChoices) -> None:
        """Use other choices of the user; images whose crop box has changed are read again."""
        if choices == self.choices:
            return
        with self._lock:
            before, self.choices = self.choices.boxes, choices
            for name in before.keys() | choices.boxes.keys():
                if before.get(name) != choices.boxes.get(name):
                    self._rows.pop(name, None)
                    self._pending += [name] if name in self.images else []

    def used_rows(self) -> list[tuple[str, ImageRow]]:
        """Return (name, row) of the images that have been read and are not left out."""
        return [(name, row) for name, row in self.rows() if name not in self.choices.excluded]

    def invalidate(self) -> None:
        """List the folder again at the next refresh, even if its modification time is the same."""
        with self._lock:
            self._folders = {}

    def caption_changed(self, path: Path) -> None:
        """Update the images of a changed or removed caption file, without listing the folder."""
        stem = unicodedata.normalize(
            "NFC", path.relative_to(self.folder).with_suffix("").as_posix()
        )
        caption_file = LocalFile(path) if path.is_file() else None
        with self._lock:
            names = [name for name in self.images if name.rpartition(".")[0] == stem]
            self.images = {
                **self.images,
                **{name: replace(self.images[name], caption_file=caption_file) for name in names},
            }
            if self._folders:  # otherwise the next refresh lists them all
                self._folders[str(path.parent)] = _mtime_ns(path.parent)
            for name in names:
                self.refresh_row(self.images[name])

    def rows(self) -> list[tuple[str, ImageRow]]:
        """Return (name, row) of the images that have been read."""
        rows = ((name, self._rows.get(name)) for name in self.images)
        return [(name, row) for name, row in rows if row is not None]

    def refresh_row(self, image: ImageFile) -> ImageRow:
        """Read the image's files again if they changed; return the updated row."""
        row = self._read_row(image)
        self._rows[image.relative_path] = row
        return row

    def _scan_names(self) -> None:
        self._folders = {}
        before = {
            str(self.folder),
            *(os.path.dirname(image.file.address) for image in self.images.values()),
        }
        # Read the times before listing, so that a change in between is not missed.
        times = {folder: _mtime_ns(folder) for folder in before}
        images, rejections, *_ = find_image_files(self.dataset)
        new_folders = {os.path.dirname(image.file.address) for image in images} - before
        times |= {folder: _mtime_ns(folder) for folder in new_folders}
        self.images = {image.relative_path: image for image in images}
        self.rejected_names = {rejection.path: rejection.detail for rejection in rejections}
        self._allowed_folders = {str(self.folder)}
        for name in self._rows.keys() - self.images.keys():
            del self._rows[name]
        # New images sort last and are popped first.
        self._pending = sorted(self.images, key=lambda name: name not in self._rows)
        self._folders = times
        self._due_t = NOT_SCHEDULED

    def _read_row(self, image: ImageFile) -> ImageRow:
        try:
            caption = image.caption_file
            stamps = (
                *self._file_stamp(image.file.address),
                *(NO_FILE if caption is None else self._file_stamp(caption.address)),
            )
        except PathOutsideWorkspace as error:
            return ImageRow((*NO_FILE, *NO_FILE), NO_FILE, (), str(error))
        old = self._rows.get(image.relative_path)
        if old is not None and old.stamps == stamps:
            return old
        size = NO_FILE
        problem = None
        captions: tuple[str, ...] = ()
        try:
            size = self._image_size(image, stamps[:2])
            # Raises UnusableFile if the aspect ratio is beyond the limits.
            box = self.choices.boxes.get(image.relative_path)
            assign_bucket(ResizeCropConfig(), size, image.relative_path, 0, 1, box)
            captions = read_captions(self.dataset, image.file, image.caption_file, DEFAULT_OPTIONS)
        except UnusableFile as error:
            problem = None if error.reason == "caption_missing" else str(error)
        return ImageRow(stamps, size, captions, problem)

    def _file_stamp(self, path: str) -> tuple[int, int]:
        """Return (mtime_ns, bytes).

        Raises PathOutsideWorkspace for a link out of the allowed folders.
        """
        parent = os.path.dirname(path)
        if parent not in self._allowed_folders:
            self.workspace.resolve(parent)
            self._allowed_folders.add(parent)
        try:
            if os.path.islink(path):
                self.workspace.resolve(path)
            status = os.stat(path)
        except OSError:
            return NO_FILE
        return status.st_mtime_ns, status.st_size

    def _image_size(self, image: ImageFile, stamp: tuple[int, int]) -> tuple[int, int]:
        cached = self._cached_headers().get(image.relative_path, [])
        if len(cached) == 4 and (cached[0], cached[1]) == stamp:
            return cached[2], cached[3]
        size = read_image_header(image.file, DEFAULT_OPTIONS.max_image_megapixels).size_px
        self._has_new_headers = True
        return size

    def _cached_headers(self) -> dict[str, list[int]]:
        if self._headers is None:
            self._headers = (read_json_object(self.header_cache_path) or {}).get(
                HEADER_CACHE_KEY, {}
            )
        return self._headers

    def _save_headers(self) -> None:
        self._headers = None  # read again when there are new images
        if self._has_new_headers:
            self._has_new_headers = False
            rows = ((name, row) for name, row in self.rows() if row.size_px != NO_FILE)
            headers = {name: [*row.stamps[:2], *row.size_px] for name, row in rows}
            with contextlib.suppress(
                OSError
            ):  # on a full disk, the headers are read again next time
                self.header_cache_path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.header_cache_path, json.dumps({HEADER_CACHE_KEY: headers}))


def _mtime_ns(folder: Path | str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0
