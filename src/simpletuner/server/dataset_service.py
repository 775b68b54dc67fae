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

from simpletuner.atomic_io import write_atomically
from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import ImageSize, ResizeCropConfig, bucket_size
from simpletuner.data.image_files import IMAGE_SUFFIXES, ImageFile
from simpletuner.errors import DataError
from simpletuner.server.api_errors import abort
from simpletuner.server.log_reader import read_json_object
from simpletuner.server.schemas.datasets import (
    BucketCount,
    CaptionWrite,
    DatasetInfo,
    DatasetItem,
    DatasetItemPage,
    FolderListing,
)
from simpletuner.server.workspace import Workspace

if TYPE_CHECKING:
    from simpletuner.server.image_index import ImageIndex
    from simpletuner.server.uploads import IncomingUpload

DATASET_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
ALIGNMENT_PX = 64
READ_WAIT_S = 0.5  # for what changed to be read; afterwards one is told how much is unread
MAX_CAPTION_CHARS = 20_000  # characters of a caption; 512 tokens are some 2,500
DEFAULT_SEED: int = RunConfig().training.seed


@dataclass(frozen=True)
class CropSettings:
    """How pictures would be cut. seed: of the run, for crop_style random."""

    framing: ResizeCropConfig = field(default_factory=ResizeCropConfig)
    seed: int = DEFAULT_SEED


class DatasetService:
    """A dataset is owned (its folder lies in the workspace's datasets/) or a folder that was added by name;
    these are listed in .simpletuner/datasets.json. Threads may call anything at once.
    """

    def __init__(self, place: Workspace) -> None:
        self.workspace = place
        self._indexes: dict[tuple[str, Path], ImageIndex] = {}
        self._lock, self._write_lock = threading.Lock(), threading.Lock()

    def list_datasets(self) -> list[DatasetInfo]:
        """By name; folders that are gone, or outside of what is allowed by now, are passed over."""
        names = set(self._added_folders())
        if self.workspace.datasets_dir.is_dir():
            names |= {
                entry.name for entry in os.scandir(self.workspace.datasets_dir) if entry.is_dir()
            }
        end = time.monotonic() + READ_WAIT_S
        return [
            self._info_or_problem(name, end)
            for name in sorted(names)
            if self._find_folder(name) is not None
        ]

    def create(self, name: str, path: str | None) -> DatasetInfo:
        """A new folder in the workspace, or the name for an existing folder. Raises Refused, Outside."""
        if not DATASET_NAME.fullmatch(name):
            abort(
                422,
                "a name has up to 64 letters, digits, - _ . and does not begin with a dot",
                "name",
            )
        with self._lock:
            if self._find_folder(name) is not None or os.path.lexists(
                self.workspace.datasets_dir / name
            ):
                abort(409, f"there is a dataset {name} already", "name")
            if path is None:
                (self.workspace.datasets_dir / name).mkdir(parents=True)
            else:
                folder = self.workspace.resolve(path)
                if not folder.is_dir():
                    abort(422, "that is no folder", "path")
                if folder == self.workspace.root or self._is_server_folder(folder):
                    abort(422, "name a folder of pictures, not the server's own", "path")
                self.workspace.server_dir.mkdir(exist_ok=True)
                listed = {**self._added_folders(), name: str(folder)}
                write_atomically(
                    self.workspace.server_dir / "datasets.json", json.dumps(listed, indent=1)
                )
        return self.get_info(name)

    def get_info(self, name: str, wait_s: float = READ_WAIT_S) -> DatasetInfo:
        catalogue = self._refreshed_index(name, wait_s)
        rows = catalogue.rows()
        kinds = Counter(row.status for _, row in rows)
        return DatasetInfo(
            name=name,
            path=str(catalogue.folder),
            owned=self.is_owned(name),
            pictures=len(catalogue.images) + len(catalogue.rejected_names),
            captioned=kinds["captioned"],
            refused=kinds["refused"] + len(catalogue.rejected_names),
            size_bytes=sum(row.stamps[0][1] for _, row in rows),
            unread=max(0, len(catalogue.images) - len(rows)),
        )

    def _info_or_problem(self, name: str, end: float) -> DatasetInfo:
        try:
            return self.get_info(name, max(READ_WAIT_S / 10, end - time.monotonic()))
        except DataError as error:  # one folder that cannot be read does not hide the others
            return DatasetInfo(
                name=name,
                path=str(self._require_folder(name)),
                owned=self.is_owned(name),
                pictures=0,
                captioned=0,
                refused=0,
                size_bytes=0,
                problem=str(error),
            )

    def list_items(
        self, name: str, offset: int, limit: int, only: str, view: CropSettings
    ) -> DatasetItemPage:
        """A page in the order of names. only: all, captioned, uncaptioned, refused."""
        catalogue = self._refreshed_index(name)
        rows = catalogue.rows()
        shown = (
            list(catalogue.images)
            if only == "all"
            else [key for key, row in rows if row.status == only]
        )
        shown += sorted(catalogue.rejected_names) if only in ("all", "refused") else []
        page = [self._build_item(catalogue, key, view) for key in shown[offset : offset + limit]]
        unread = max(0, len(catalogue.images) - len(rows))
        return DatasetItemPage(total=len(shown), offset=offset, items=page, unread=unread)

    def count_buckets(self, name: str, view: CropSettings) -> list[BucketCount]:
        """Of the pictures that are read and can be trained on, by width and height."""
        sizes = Counter(
            row.size_px for _, row in self._refreshed_index(name).rows() if row.problem is None
        )
        totals: Counter[ImageSize] = Counter()
        for size, count in sizes.items():
            totals[bucket_size(view.framing, size, ALIGNMENT_PX)] += count
        return [
            BucketCount(width_px=w, height_px=h, pictures=count)
            for (w, h), count in sorted(totals.items())
        ]

    def image_path(self, name: str, file: str) -> Path:
        """The file of an item. Raises Refused 404 for every other name, Outside for a link that leads out."""
        return self.workspace.resolve(self._require_image(self._refreshed_index(name), file).path)

    def write_caption(
        self, name: str, file: str, ask: CaptionWrite, view: CropSettings
    ) -> DatasetItemPage:
        """Write a caption; the item as it is then. Raises Refused: 409 when another text
        is there than ask.before, 422 for what cannot be a caption. Undoing is writing the old text.
        """
        catalogue = self._refreshed_index(name)
        with self._write_lock:
            found = self._require_image(catalogue, file)
            self.workspace.resolve(found.path)
            text = found.caption_path or found.path.with_suffix(".txt")
            self.workspace.resolve(text)
            _write_caption(text, ask, self.workspace)
            catalogue.caption_changed(text)
        return DatasetItemPage(total=1, offset=0, items=[self._build_item(catalogue, file, view)])

    def is_owned(self, name: str) -> bool:
        home = self.workspace.resolve_or_none(self.workspace.datasets_dir)
        return home is not None and self._find_folder(name) == home / name

    def begin_upload(self, name: str, file: str, length: int, limit: int) -> IncomingUpload:
        """An upload into an owned dataset; see Incoming. Raises Refused."""
        from simpletuner.server.uploads import IncomingUpload

        folder = self._require_folder(name)
        if not self.is_owned(name):
            abort(
                409,
                f"files are added here to datasets of the workspace only; copy them into {folder}",
            )
        return IncomingUpload(self.workspace, folder, file, length, limit)

    def invalidate(self, name: str) -> None:
        """The next look at the dataset reads its folder again."""
        catalogue = self._indexes.get((name, self._require_folder(name)))
        if catalogue is not None:
            catalogue.invalidate()

    def browse_folder(self, path: str) -> FolderListing:
        """What may be looked into. Raises Outside; Refused 404 for what is no folder."""
        if not path:
            return FolderListing(
                path="", folders=[str(root) for root in self.workspace.allowed_roots], pictures=0
            )
        folder = self.workspace.resolve(path)
        if not folder.is_dir() or self._is_server_folder(folder):
            abort(404, "that is no folder")
        inner, pictures = [], 0
        for entry in os.scandir(folder):
            shown = not entry.name.startswith(".") and entry.name.isprintable()
            pictures += shown and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
            if shown and entry.is_dir() and self.workspace.resolve_or_none(entry.path):
                inner.append(entry.path)
        return FolderListing(path=str(folder), folders=sorted(inner), pictures=pictures)

    def _is_server_folder(self, folder: Path) -> bool:
        return self.workspace.server_dir in (folder, *folder.parents)

    def _added_folders(self) -> dict[str, str]:
        return read_json_object(self.workspace.server_dir / "datasets.json") or {}

    def _find_folder(self, name: str) -> Path | None:
        """The folder of a dataset, links followed; None when there is none that may be shown."""
        if not DATASET_NAME.fullmatch(name):
            return None
        own = self.workspace.datasets_dir / name
        written = own if own.is_dir() else self._added_folders().get(name)
        folder = self.workspace.resolve_or_none(written) if written is not None else None
        return folder if folder is not None and folder.is_dir() else None

    def _require_folder(self, name: str) -> Path:
        return self._find_folder(name) or abort(404, "there is no such dataset")

    def _require_image(self, catalogue: ImageIndex, file: str) -> ImageFile:
        return catalogue.images.get(file) or abort(404, "there is no such picture")

    def _refreshed_index(self, name: str, wait_s: float = READ_WAIT_S) -> ImageIndex:
        from simpletuner.server.image_index import ImageIndex

        folder = self._require_folder(name)
        with self._lock:
            kept = self.workspace.server_dir / "datasets" / f"{name}.json"
            made = ImageIndex(self.workspace, name, folder, kept)
            catalogue = self._indexes.setdefault((name, folder), made)
        catalogue.refresh(wait_s)
        return catalogue

    def _build_item(self, catalogue: ImageIndex, file: str, view: CropSettings) -> DatasetItem:
        from simpletuner.data.scan import assign_bucket

        found = catalogue.images.get(file)
        row = catalogue.refresh_row(found) if found is not None else None
        if found is None or row is None:
            wrong = catalogue.rejected_names.get(file, "is gone")
            return DatasetItem(
                file=file,
                width_px=0,
                height_px=0,
                captions=[],
                caption_text=None,
                refused=wrong,
                bucket_px=None,
                crop_px=None,
            )
        window, cut = None, None
        if row.problem is None:
            sample_id = f"{catalogue.dataset.id}/{file}"
            resize, corner, window = assign_bucket(
                view.framing, row.size_px, sample_id, view.seed, ALIGNMENT_PX
            )
            cut = _crop_in_image(row.size_px, resize, corner, window)
        return DatasetItem(
            file=file,
            width_px=row.size_px[0],
            height_px=row.size_px[1],
            captions=list(row.captions),
            caption_text=read_caption(found.caption_path) if row.stamps[0] != (0, 0) else None,
            refused=row.problem,
            bucket_px=window,
            crop_px=cut,
        )


def read_caption(path: Path | None) -> str | None:
    """The text of a file as it is; None where there is none, or it is not UTF-8."""
    try:
        return None if path is None else path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def _write_caption(text: Path, ask: CaptionWrite, place: Workspace) -> None:
    """What was there goes to the trash first. A blank caption only removes it."""
    if (
        len(ask.text) > MAX_CAPTION_CHARS
        or "\0" in ask.text
        or any("\ud800" <= one <= "\udfff" for one in ask.text)
    ):
        abort(422, f"a caption is text of at most {MAX_CAPTION_CHARS} characters", "text")
    if read_caption(text) != ask.before:
        abort(409, "the caption was changed meanwhile; look at it again before you write", "before")
    if text.is_file():
        shutil.copyfile(text, place.make_trash_folder() / text.name)
    if ask.text.strip():
        write_atomically(text, ask.text)
    else:
        text.unlink(missing_ok=True)


def _crop_in_image(
    size: ImageSize, resize: ImageSize, corner: ImageSize, window: ImageSize
) -> tuple[int, int, int, int]:
    """The window (left, top, width, height) in the picture's own pixels, to the nearest one."""
    first = [round(corner[at] * size[at] / resize[at]) for at in (0, 1)]
    last = [round((corner[at] + window[at]) * size[at] / resize[at]) for at in (0, 1)]
    return first[0], first[1], max(1, last[0] - first[0]), max(1, last[1] - first[1])
