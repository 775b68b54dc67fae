"""What a folder of pictures holds, read once and kept up to date while it is looked at."""

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
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.data.image_files import ImageFile, find_image_files
from simpletuner.data.pixels import read_image_header
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.scan import assign_bucket
from simpletuner.errors import DataError
from simpletuner.server.log_reader import read_json_object
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace

DEFAULT_OPTIONS = DataOptions()
HEADER_CACHE_KEY = f"headers up to {DEFAULT_OPTIONS.max_image_megapixels:g} megapixels"
# So old may be what is answered without a look at every file; a changed folder is seen at once.
RESCAN_AFTER_S, NOT_SCHEDULED = 10.0, float("inf")
NO_FILE = (0, 0)
SourceStamps = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class ImageRow:
    """One picture as read. mark: (mtime_ns, bytes) of its file and of its caption file, zeros where there is
    none. size_px: upright; (0, 0) when the header could not be read. wrong: why it cannot be trained on.
    """

    stamps: SourceStamps
    size_px: tuple[int, int]
    captions: tuple[str, ...]
    problem: str | None

    @property
    def status(self) -> str:
        """Of the three that every picture is one of."""
        return (
            "refused"
            if self.problem is not None
            else "captioned"
            if self.captions
            else "uncaptioned"
        )


class ImageIndex:
    """Of one folder. Whoever looks reads a part of what is new; threads may look at once.

    kept: a JSON file that spares reading headers again in the next process; it can be deleted at any time.
    """

    def __init__(self, place: Workspace, name: str, folder: Path, kept: Path) -> None:
        self.workspace, self.folder, self.header_cache_path = place, folder, kept
        self.dataset = DatasetConfig(name, "image", folder)
        self.images: dict[str, ImageFile] = {}
        self.rejected_names: dict[str, str] = {}
        self._rows: dict[str, ImageRow] = {}
        self._pending: list[str] = []
        self._headers: dict[str, list[int]] | None = None
        self._folders: dict[
            str, int
        ] = {}  # with the times of their last change; none: not named yet
        self._allowed_folders: set[str] = set()
        self._due_t = NOT_SCHEDULED
        self._lock = threading.Lock()

    def refresh(self, wait_s: float) -> None:
        """Names are known then, and rows of what is new as far as that time sufficed. Raises DataError when
        the folder cannot be read.
        """
        deadline = time.monotonic() + wait_s
        if not self._lock.acquire(timeout=wait_s if self._folders else -1):
            return  # somebody else reads
        try:
            changed = any(_mtime_ns(folder) != seen for folder, seen in self._folders.items())
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

    def invalidate(self) -> None:
        """Something was written here, whatever the folder's coarse clock says: the next look reads it."""
        with self._lock:
            self._folders = {}

    def caption_changed(self, text: Path) -> None:
        """That caption file was written or removed: seen without reading the folder again."""
        stem = unicodedata.normalize(
            "NFC", text.relative_to(self.folder).with_suffix("").as_posix()
        )
        there = text if text.is_file() else None
        with self._lock:
            names = [name for name in self.images if name.rpartition(".")[0] == stem]
            self.images = {
                **self.images,
                **{name: replace(self.images[name], caption_path=there) for name in names},
            }
            if self._folders:  # else the next look reads them all
                self._folders[str(text.parent)] = _mtime_ns(text.parent)
            for name in names:
                self.refresh_row(self.images[name])

    def rows(self) -> list[tuple[str, ImageRow]]:
        """Those that are read, by name."""
        rows = ((name, self._rows.get(name)) for name in self.images)
        return [(name, row) for name, row in rows if row is not None]

    def refresh_row(self, found: ImageFile) -> ImageRow:
        """As its files are now."""
        self._rows[found.relative_path] = row = self._read_row(found)
        return row

    def _scan_names(self) -> None:
        self._folders = {}
        before = {str(self.folder), *(os.path.dirname(one.path) for one in self.images.values())}
        times = {
            path: _mtime_ns(path) for path in before
        }  # taken first, so that no change is missed
        found, misnamed, _ = find_image_files(self.dataset)
        times |= {
            path: _mtime_ns(path) for path in {os.path.dirname(one.path) for one in found} - before
        }
        self.images = {one.relative_path: one for one in found}
        self.rejected_names = {one.path: one.detail for one in misnamed}
        self._allowed_folders = {str(self.folder)}
        for gone in self._rows.keys() - self.images.keys():
            del self._rows[gone]
        self._pending = sorted(
            self.images, key=lambda name: name not in self._rows
        )  # new ones come first
        self._folders, self._due_t = times, NOT_SCHEDULED

    def _read_row(self, found: ImageFile) -> ImageRow:
        try:
            mark = (
                self._file_status(found.path),
                self._file_status(found.caption_path) if found.caption_path else NO_FILE,
            )
        except PathOutsideWorkspace as error:
            return ImageRow((NO_FILE, NO_FILE), NO_FILE, (), str(error))
        old = self._rows.get(found.relative_path)
        if old is not None and old.stamps == mark:
            return old
        size, wrong = NO_FILE, None
        said: tuple[str, ...] = ()
        try:
            size = self._image_size(found, mark[0])
            assign_bucket(
                ResizeCropConfig(), size, found.relative_path, 0, 1
            )  # refuses what is beyond the limits of aspect
            said = read_captions(self.dataset, found.path, found.caption_path, DEFAULT_OPTIONS)
        except UnusableFile as error:
            wrong = None if error.reason == "caption_missing" else str(error)
        return ImageRow(mark, size, said, wrong)

    def _file_status(self, path: Path) -> tuple[int, int]:
        """Raises Outside for a link that leads out of what the server may show."""
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

    def _image_size(self, found: ImageFile, mark: tuple[int, int]) -> tuple[int, int]:
        known = self._cached_headers().get(found.relative_path, [])
        if len(known) == 4 and (known[0], known[1]) == mark:
            return known[2], known[3]
        return read_image_header(found.path, DEFAULT_OPTIONS.max_image_megapixels).size_px

    def _cached_headers(self) -> dict[str, list[int]]:
        if self._headers is None:
            self._headers = (read_json_object(self.header_cache_path) or {}).get(
                HEADER_CACHE_KEY, {}
            )
        return self._headers

    def _save_headers(self) -> None:
        rows = [(name, row) for name, row in self.rows() if row.size_px != NO_FILE]
        headers = {name: [*row.stamps[0], *row.size_px] for name, row in rows}
        if headers != self._cached_headers():
            self._headers = headers
            with contextlib.suppress(OSError):  # a full disk: read again another time
                self.header_cache_path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.header_cache_path, json.dumps({HEADER_CACHE_KEY: headers}))


def _mtime_ns(folder: Path | str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0
