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

from simpletuner.config.schema import DataOptions
from simpletuner.data.captions import captions
from simpletuner.data.dataset import Dataset
from simpletuner.data.files import Found, find
from simpletuner.data.geometry import Framing
from simpletuner.data.pixels import read_header
from simpletuner.data.report import BadFile
from simpletuner.data.scan import frame
from simpletuner.durable import write_atomically
from simpletuner.errors import DataError
from simpletuner.server.place import Outside, Place
from simpletuner.server.tail import document

OPTIONS = DataOptions()
LIMITS = f"headers up to {OPTIONS.max_image_megapixels:g} megapixels"
# So old may be what is answered without a look at every file; a changed folder is seen at once.
FRESH_S, UNSETTLED = 10.0, float("inf")
ABSENT = (0, 0)
Mark = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Row:
    """One picture as read. mark: (mtime_ns, bytes) of its file and of its caption file, zeros where there is
    none. size_px: upright; (0, 0) when the header could not be read. wrong: why it cannot be trained on.
    """

    mark: Mark
    size_px: tuple[int, int]
    said: tuple[str, ...]
    wrong: str | None

    @property
    def kind(self) -> str:
        """Of the three that every picture is one of."""
        return "refused" if self.wrong is not None else "captioned" if self.said else "uncaptioned"


class Catalogue:
    """Of one folder. Whoever looks reads a part of what is new; threads may look at once.

    kept: a JSON file that spares reading headers again in the next process; it can be deleted at any time.
    """

    def __init__(self, place: Place, name: str, folder: Path, kept: Path) -> None:
        self.place, self.folder, self.kept = place, folder, kept
        self.dataset = Dataset(name, "image", folder)
        self.found: dict[str, Found] = {}
        self.misnamed: dict[str, str] = {}
        self._rows: dict[str, Row] = {}
        self._waiting: list[str] = []
        self._headers: dict[str, list[int]] | None = None
        self._folders: dict[str, int] = {}  # with the times of their last change; none: not named yet
        self._inside: set[str] = set()
        self._due_t = UNSETTLED
        self._lock = threading.Lock()

    def look(self, wait_s: float) -> None:
        """Names are known then, and rows of what is new as far as that time sufficed. Raises DataError when
        the folder cannot be read.
        """
        deadline = time.monotonic() + wait_s
        if not self._lock.acquire(timeout=wait_s if self._folders else -1):
            return  # somebody else reads
        try:
            changed = any(_mtime(folder) != seen for folder, seen in self._folders.items())
            if changed or not self._folders or time.monotonic() > self._due_t:
                self._name()
            while self._waiting and time.monotonic() < deadline:
                name = self._waiting.pop()
                self._rows[name] = self._read(self.found[name])
            if not self._waiting and self._due_t == UNSETTLED:
                self._due_t = time.monotonic() + FRESH_S
                self._keep()
        except OSError as error:
            raise DataError(f"{self.folder}: {error.strerror}") from error
        finally:
            self._lock.release()

    def changed(self) -> None:
        """Something was written here, whatever the folder's coarse clock says: the next look reads it."""
        with self._lock:
            self._folders = {}

    def touched(self, text: Path) -> None:
        """That caption file was written or removed: seen without reading the folder again."""
        stem = unicodedata.normalize("NFC", text.relative_to(self.folder).with_suffix("").as_posix())
        there = text if text.is_file() else None
        with self._lock:
            names = [name for name in self.found if name.rpartition(".")[0] == stem]
            self.found = {**self.found, **{name: replace(self.found[name], text=there) for name in names}}
            if self._folders:  # else the next look reads them all
                self._folders[str(text.parent)] = _mtime(text.parent)
            for name in names:
                self.row(self.found[name])

    def rows(self) -> list[tuple[str, Row]]:
        """Those that are read, by name."""
        rows = ((name, self._rows.get(name)) for name in self.found)
        return [(name, row) for name, row in rows if row is not None]

    def row(self, found: Found) -> Row:
        """As its files are now."""
        self._rows[found.name] = row = self._read(found)
        return row

    def _name(self) -> None:
        self._folders = {}
        before = {str(self.folder), *(os.path.dirname(one.path) for one in self.found.values())}
        times = {path: _mtime(path) for path in before}  # taken first, so that no change is missed
        found, misnamed, _ = find(self.dataset)
        times |= {path: _mtime(path) for path in {os.path.dirname(one.path) for one in found} - before}
        self.found = {one.name: one for one in found}
        self.misnamed = {one.path: one.detail for one in misnamed}
        self._inside = {str(self.folder)}
        for gone in self._rows.keys() - self.found.keys():
            del self._rows[gone]
        self._waiting = sorted(self.found, key=lambda name: name not in self._rows)  # new ones come first
        self._folders, self._due_t = times, UNSETTLED

    def _read(self, found: Found) -> Row:
        try:
            mark = self._status(found.path), self._status(found.text) if found.text else ABSENT
        except Outside as error:
            return Row((ABSENT, ABSENT), ABSENT, (), str(error))
        old = self._rows.get(found.name)
        if old is not None and old.mark == mark:
            return old
        size, wrong = ABSENT, None
        said: tuple[str, ...] = ()
        try:
            size = self._size(found, mark[0])
            frame(Framing(), size, found.name, 0, 1)  # refuses what is beyond the limits of aspect
            said = captions(self.dataset, found.path, found.text, OPTIONS)
        except BadFile as error:
            wrong = None if error.reason == "caption_missing" else str(error)
        return Row(mark, size, said, wrong)

    def _status(self, path: Path) -> tuple[int, int]:
        """Raises Outside for a link that leads out of what the server may show."""
        parent = os.path.dirname(path)
        if parent not in self._inside:
            self.place.inside(parent)
            self._inside.add(parent)
        try:
            if os.path.islink(path):
                self.place.inside(path)
            status = os.stat(path)
        except OSError:
            return ABSENT
        return status.st_mtime_ns, status.st_size

    def _size(self, found: Found, mark: tuple[int, int]) -> tuple[int, int]:
        known = self._known().get(found.name, [])
        if len(known) == 4 and (known[0], known[1]) == mark:
            return known[2], known[3]
        return read_header(found.path, OPTIONS.max_image_megapixels).size

    def _known(self) -> dict[str, list[int]]:
        if self._headers is None:
            self._headers = (document(self.kept) or {}).get(LIMITS, {})
        return self._headers

    def _keep(self) -> None:
        rows = [(name, row) for name, row in self.rows() if row.size_px != ABSENT]
        headers = {name: [*row.mark[0], *row.size_px] for name, row in rows}
        if headers != self._known():
            self._headers = headers
            with contextlib.suppress(OSError):  # a full disk: read again another time
                self.kept.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.kept, json.dumps({LIMITS: headers}))


def _mtime(folder: Path | str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0
