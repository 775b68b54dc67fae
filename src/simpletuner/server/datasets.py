"""Folders of pictures in the workspace, and those a person named: what is in them, how it would be cut."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.config.schema import RunConfig
from simpletuner.data.files import SUFFIXES, Found
from simpletuner.data.geometry import Framing, Size, bucket
from simpletuner.durable import write_atomically
from simpletuner.errors import DataError
from simpletuner.server.place import Place
from simpletuner.server.refusal import refuse
from simpletuner.server.tail import document
from simpletuner.server.wire.datasets import Bucket, CaptionWrite, DatasetInfo, Folder, Item, Items

if TYPE_CHECKING:
    from simpletuner.server.catalogue import Catalogue
    from simpletuner.server.uploads import Incoming

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
ALIGNMENT_PX = 64
WAIT_S = 0.5  # for what changed to be read; afterwards one is told how much is unread
LONGEST = 20_000  # characters of a caption; 512 tokens are some 2,500
SEED: int = RunConfig().training.seed


@dataclass(frozen=True)
class View:
    """How pictures would be cut. seed: of the run, for crop_style random."""

    framing: Framing = field(default_factory=Framing)
    seed: int = SEED


class Datasets:
    """A dataset is owned (its folder lies in the workspace's datasets/) or a folder that was added by name;
    these are listed in .simpletuner/datasets.json. Threads may call anything at once.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._catalogues: dict[tuple[str, Path], Catalogue] = {}
        self._lock, self._writing = threading.Lock(), threading.Lock()

    def all(self) -> list[DatasetInfo]:
        """By name; folders that are gone, or outside of what is allowed by now, are passed over."""
        names = set(self._added())
        if self.place.datasets.is_dir():
            names |= {entry.name for entry in os.scandir(self.place.datasets) if entry.is_dir()}
        end = time.monotonic() + WAIT_S
        return [self._listed(name, end) for name in sorted(names) if self._find(name) is not None]

    def make(self, name: str, path: str | None) -> DatasetInfo:
        """A new folder in the workspace, or the name for an existing folder. Raises Refused, Outside."""
        if not NAME.fullmatch(name):
            refuse(422, "a name has up to 64 letters, digits, - _ . and does not begin with a dot", "name")
        with self._lock:
            if self._find(name) is not None or os.path.lexists(self.place.datasets / name):
                refuse(409, f"there is a dataset {name} already", "name")
            if path is None:
                (self.place.datasets / name).mkdir(parents=True)
            else:
                folder = self.place.inside(path)
                if not folder.is_dir():
                    refuse(422, "that is no folder", "path")
                if folder == self.place.workspace or self._is_own(folder):
                    refuse(422, "name a folder of pictures, not the server's own", "path")
                self.place.own.mkdir(exist_ok=True)
                listed = {**self._added(), name: str(folder)}
                write_atomically(self.place.own / "datasets.json", json.dumps(listed, indent=1))
        return self.info(name)

    def info(self, name: str, wait_s: float = WAIT_S) -> DatasetInfo:
        catalogue = self._catalogue(name, wait_s)
        rows = catalogue.rows()
        kinds = Counter(row.kind for _, row in rows)
        return DatasetInfo(
            name=name, path=str(catalogue.folder), owned=self.owned(name),
            pictures=len(catalogue.found) + len(catalogue.misnamed), captioned=kinds["captioned"],
            refused=kinds["refused"] + len(catalogue.misnamed),
            size_bytes=sum(row.mark[0][1] for _, row in rows),
            unread=max(0, len(catalogue.found) - len(rows)),
        )  # fmt: skip

    def _listed(self, name: str, end: float) -> DatasetInfo:
        try:
            return self.info(name, max(WAIT_S / 10, end - time.monotonic()))
        except DataError as error:  # one folder that cannot be read does not hide the others
            return DatasetInfo(name=name, path=str(self._folder(name)), owned=self.owned(name), pictures=0,
                               captioned=0, refused=0, size_bytes=0, problem=str(error))  # fmt: skip

    def items(self, name: str, offset: int, limit: int, only: str, view: View) -> Items:
        """A page in the order of names. only: all, captioned, uncaptioned, refused."""
        catalogue = self._catalogue(name)
        rows = catalogue.rows()
        shown = list(catalogue.found) if only == "all" else [key for key, row in rows if row.kind == only]
        shown += sorted(catalogue.misnamed) if only in ("all", "refused") else []
        page = [self._item(catalogue, key, view) for key in shown[offset : offset + limit]]
        unread = max(0, len(catalogue.found) - len(rows))
        return Items(total=len(shown), offset=offset, items=page, unread=unread)

    def buckets(self, name: str, view: View) -> list[Bucket]:
        """Of the pictures that are read and can be trained on, by width and height."""
        sizes = Counter(row.size_px for _, row in self._catalogue(name).rows() if row.wrong is None)
        totals: Counter[Size] = Counter()
        for size, count in sizes.items():
            totals[bucket(view.framing, size, ALIGNMENT_PX)] += count
        return [Bucket(width_px=w, height_px=h, pictures=count) for (w, h), count in sorted(totals.items())]

    def picture(self, name: str, file: str) -> Path:
        """The file of an item. Raises Refused 404 for every other name, Outside for a link that leads out."""
        return self.place.inside(self._found(self._catalogue(name), file).path)

    def caption(self, name: str, file: str, ask: CaptionWrite, view: View) -> Items:
        """Write a caption; the item as it is then. Raises Refused: 409 when another text
        is there than ask.before, 422 for what cannot be a caption. Undoing is writing the old text."""
        catalogue = self._catalogue(name)
        with self._writing:
            found = self._found(catalogue, file)
            self.place.inside(found.path)
            text = found.text or found.path.with_suffix(".txt")
            self.place.inside(text)
            _write_caption(text, ask, self.place)
            catalogue.touched(text)
        return Items(total=1, offset=0, items=[self._item(catalogue, file, view)])

    def owned(self, name: str) -> bool:
        home = self.place.allows(self.place.datasets)
        return home is not None and self._find(name) == home / name

    def begin(self, name: str, file: str, length: int, limit: int) -> Incoming:
        """An upload into an owned dataset; see Incoming. Raises Refused."""
        from simpletuner.server.uploads import Incoming

        folder = self._folder(name)
        if not self.owned(name):
            refuse(409, f"files are added here to datasets of the workspace only; copy them into {folder}")
        return Incoming(self.place, folder, file, length, limit)

    def uploaded(self, name: str) -> None:
        """The next look at the dataset reads its folder again."""
        catalogue = self._catalogues.get((name, self._folder(name)))
        if catalogue is not None:
            catalogue.changed()

    def folders(self, path: str) -> Folder:
        """What may be looked into. Raises Outside; Refused 404 for what is no folder."""
        if not path:
            return Folder(path="", folders=[str(root) for root in self.place.allowed], pictures=0)
        folder = self.place.inside(path)
        if not folder.is_dir() or self._is_own(folder):
            refuse(404, "that is no folder")
        inner, pictures = [], 0
        for entry in os.scandir(folder):
            shown = not entry.name.startswith(".") and entry.name.isprintable()
            pictures += shown and os.path.splitext(entry.name)[1].lower() in SUFFIXES
            if shown and entry.is_dir() and self.place.allows(entry.path):
                inner.append(entry.path)
        return Folder(path=str(folder), folders=sorted(inner), pictures=pictures)

    def _is_own(self, folder: Path) -> bool:
        return self.place.own in (folder, *folder.parents)

    def _added(self) -> dict[str, str]:
        return document(self.place.own / "datasets.json") or {}

    def _find(self, name: str) -> Path | None:
        """The folder of a dataset, links followed; None when there is none that may be shown."""
        if not NAME.fullmatch(name):
            return None
        own = self.place.datasets / name
        written = own if own.is_dir() else self._added().get(name)
        folder = self.place.allows(written) if written is not None else None
        return folder if folder is not None and folder.is_dir() else None

    def _folder(self, name: str) -> Path:
        return self._find(name) or refuse(404, "there is no such dataset")

    def _found(self, catalogue: Catalogue, file: str) -> Found:
        return catalogue.found.get(file) or refuse(404, "there is no such picture")

    def _catalogue(self, name: str, wait_s: float = WAIT_S) -> Catalogue:
        from simpletuner.server.catalogue import Catalogue

        folder = self._folder(name)
        with self._lock:
            kept = self.place.own / "datasets" / f"{name}.json"
            made = Catalogue(self.place, name, folder, kept)
            catalogue = self._catalogues.setdefault((name, folder), made)
        catalogue.look(wait_s)
        return catalogue

    def _item(self, catalogue: Catalogue, file: str, view: View) -> Item:
        from simpletuner.data.scan import frame

        found = catalogue.found.get(file)
        row = catalogue.row(found) if found is not None else None
        if found is None or row is None:
            wrong = catalogue.misnamed.get(file, "is gone")
            return Item(file=file, width_px=0, height_px=0, captions=[], caption_text=None, refused=wrong,
                        bucket_px=None, crop_px=None)  # fmt: skip
        window, cut = None, None
        if row.wrong is None:
            sample_id = f"{catalogue.dataset.id}/{file}"
            resize, corner, window = frame(view.framing, row.size_px, sample_id, view.seed, ALIGNMENT_PX)
            cut = _in_picture(row.size_px, resize, corner, window)
        return Item(
            file=file, width_px=row.size_px[0], height_px=row.size_px[1], captions=list(row.said),
            caption_text=read_caption(found.text) if row.mark[0] != (0, 0) else None, refused=row.wrong,
            bucket_px=window, crop_px=cut,
        )  # fmt: skip


def read_caption(path: Path | None) -> str | None:
    """The text of a file as it is; None where there is none, or it is not UTF-8."""
    try:
        return None if path is None else path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def _write_caption(text: Path, ask: CaptionWrite, place: Place) -> None:
    """What was there goes to the trash first. A blank caption only removes it."""
    if len(ask.text) > LONGEST or "\0" in ask.text or any("\ud800" <= one <= "\udfff" for one in ask.text):
        refuse(422, f"a caption is text of at most {LONGEST} characters", "text")
    if read_caption(text) != ask.before:
        refuse(409, "the caption was changed meanwhile; look at it again before you write", "before")
    if text.is_file():
        shutil.copyfile(text, place.trash() / text.name)
    if ask.text.strip():
        write_atomically(text, ask.text)
    else:
        text.unlink(missing_ok=True)


def _in_picture(size: Size, resize: Size, corner: Size, window: Size) -> tuple[int, int, int, int]:
    """The window (left, top, width, height) in the picture's own pixels, to the nearest one."""
    first = [round(corner[at] * size[at] / resize[at]) for at in (0, 1)]
    last = [round((corner[at] + window[at]) * size[at] / resize[at]) for at in (0, 1)]
    return first[0], first[1], max(1, last[0] - first[0]), max(1, last[1] - first[1])
