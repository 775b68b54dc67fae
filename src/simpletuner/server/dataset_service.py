"""Datasets: folders of images with their captions, crops and buckets."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.atomic_io import write_atomically
from simpletuner.data.geometry import CropBox, ImageSize, bucket_size
from simpletuner.data.image_choices import check_box, read_crop_boxes
from simpletuner.data.image_files import ImageFile
from simpletuner.data.rejections import UnusableFile
from simpletuner.errors import ConfigError, DataError
from simpletuner.server.api_errors import abort
from simpletuner.server.caption_files import write_caption
from simpletuner.server.dataset_items import ALIGNMENT_PX, CropSettings, build_item
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.folder_browser import is_server_folder
from simpletuner.server.image_choice_store import ImageChoiceStore
from simpletuner.server.schemas.datasets import (
    BucketCount,
    CaptionWrite,
    DatasetFindings,
    DatasetInfo,
    DatasetItemPage,
)
from simpletuner.server.workspace import Workspace, run_id

if TYPE_CHECKING:
    from simpletuner.server.image_index import ImageIndex
    from simpletuner.server.uploads import IncomingUpload

NAME_RULE = "a name has at most 64 letters, digits, - _ . and does not start with a dot"
DATASET_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
READ_WAIT_S = (
    0.5  # time to read changed files per request; the response has the number of unread ones
)
SMALL_IMAGE_PX = 256  # shorter edge; training at the usual resolutions enlarges it


class DatasetService:
    """All datasets of a workspace. Thread-safe.

    A dataset is owned (its folder is in the workspace's datasets/) or a folder that the user added;
    added folders are listed in .simpletuner/datasets.json.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.choices = ImageChoiceStore(workspace)
        self._indexes: dict[tuple[str, Path], ImageIndex] = {}
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()

    def list_datasets(self) -> list[DatasetInfo]:
        """Return the datasets, sorted by name.

        Folders that were removed or are not allowed are skipped.
        """
        names = set(self.added_folders())
        if self.workspace.datasets_dir.is_dir():
            names |= {
                entry.name for entry in os.scandir(self.workspace.datasets_dir) if entry.is_dir()
            }
        deadline = time.monotonic() + READ_WAIT_S
        return [
            self._info_or_problem(name, deadline)
            for name in sorted(names)
            if self._find_folder(name) is not None
        ]

    def create(self, name: str, path: str | None) -> DatasetInfo:
        """Create a folder in the workspace, or add the existing folder `path` under a name.

        Raises ApiError and PathOutsideWorkspace.
        """
        if not DATASET_NAME.fullmatch(name):
            abort(422, NAME_RULE, "name")
        with self._lock:
            if self.exists(name):
                abort(409, f"there is already a dataset named {name}", "name")
            if path is None:
                (self.workspace.datasets_dir / name).mkdir(parents=True)
                self.choices.forget(self.workspace.datasets_dir / name)
            else:
                folder = self.workspace.resolve(path)
                if not folder.is_dir():
                    abort(422, "this is not a folder", "path")
                if folder == self.workspace.root or is_server_folder(self.workspace, folder):
                    abort(422, "choose a folder of images, not the server's own folder", "path")
                self.write_added_folders({**self.added_folders(), name: str(folder)})
        return self.get_info(name)

    def get_info(self, name: str, wait_s: float = READ_WAIT_S) -> DatasetInfo:
        index = self._refreshed_index(name, wait_s)
        rows = index.rows()
        kinds = Counter(row.status for _, row in index.used_rows())
        return DatasetInfo(
            name=name,
            path=str(index.folder),
            owned=self.is_owned(name),
            pictures=len(index.images) + len(index.rejected_names),
            captioned=kinds["captioned"],
            refused=kinds["refused"] + len(index.rejected_names),
            excluded=len(index.choices.excluded & index.images.keys()),
            size_bytes=sum(row.stamps[1] for _, row in rows),
            unread=max(0, len(index.images) - len(rows)),
        )

    def _info_or_problem(self, name: str, deadline: float) -> DatasetInfo:
        try:
            return self.get_info(name, max(READ_WAIT_S / 10, deadline - time.monotonic()))
        except DataError as error:  # one folder that cannot be read does not hide the others
            return DatasetInfo(
                name=name,
                path=str(self.require_folder(name)),
                owned=self.is_owned(name),
                pictures=0,
                captioned=0,
                refused=0,
                size_bytes=0,
                problem=str(error),
            )

    def list_items(
        self,
        name: str,
        offset: int,
        limit: int,
        only: str,
        crop_settings: CropSettings,
        sort: str = "name",
    ) -> DatasetItemPage:
        """Return a page of images, sorted by name or by the length of the caption.

        only: all, captioned, uncaptioned, refused, excluded, duplicate or small. All have the
        excluded ones.
        """
        index = self._refreshed_index(name)
        rows = index.rows()
        if only == "all":
            shown = list(index.images)
        elif only == "excluded":
            shown = [key for key in index.images if key in index.choices.excluded]
        elif only == "duplicate":
            shown = [key for group in self.findings(name).duplicates for key in group]
        elif only == "small":
            shown = self.findings(name).small
        else:
            shown = [key for key, row in index.used_rows() if row.status == only]
        if sort != "name":
            lengths = {key: len(" ".join(row.captions)) for key, row in rows}
            shown.sort(key=lambda key: lengths.get(key, 0), reverse=sort == "longest")
        shown += sorted(index.rejected_names) if only in ("all", "refused") else []
        page = [build_item(index, key, crop_settings) for key in shown[offset : offset + limit]]
        unread = max(0, len(index.images) - len(rows))
        return DatasetItemPage(total=len(shown), offset=offset, items=page, unread=unread)

    def count_buckets(self, name: str, crop_settings: CropSettings) -> list[BucketCount]:
        """Count the images that are read and can be trained on, per bucket size."""
        index = self._refreshed_index(name)
        boxes = index.choices.boxes
        sizes = Counter(
            boxes[key][2:] if key in boxes else row.size_px
            for key, row in index.used_rows()
            if row.problem is None
        )
        totals: Counter[ImageSize] = Counter()
        for size, count in sizes.items():
            totals[bucket_size(crop_settings.framing, size, ALIGNMENT_PX)] += count
        return [
            BucketCount(width_px=w, height_px=h, pictures=count)
            for (w, h), count in sorted(totals.items())
        ]

    def findings(self, name: str) -> DatasetFindings:
        """Return identical and very small images. Files of the same size are read completely."""
        from simpletuner.data.duplicates import find_identical_files

        index = self._refreshed_index(name)
        names = {
            image.file: key
            for key, image in index.images.items()
            if key not in index.choices.excluded
        }
        groups = find_identical_files(names)
        small = [
            key
            for key, row in index.used_rows()
            if row.problem is None and min(row.size_px) < SMALL_IMAGE_PX
        ]
        return DatasetFindings(
            duplicates=sorted(sorted(names[file] for file in group) for group in groups),
            small=sorted(small),
            small_px=SMALL_IMAGE_PX,
        )

    def image_path(self, name: str, file: str) -> Path:
        """Return the path of an image of the dataset.

        Raises ApiError 404 for any other name, PathOutsideWorkspace for a link out of the allowed
        folders.
        """
        return self.workspace.resolve(self._require_image(self._refreshed_index(name), file).path)

    def write_caption(
        self, name: str, file: str, request: CaptionWrite, crop_settings: CropSettings
    ) -> DatasetItemPage:
        """Write a caption and return the updated image. To undo a change, write the old text.

        Raises ApiError: 409 if the current text is not request.before, 422 for an invalid caption.
        """
        index = self._refreshed_index(name)
        with self._write_lock:
            image = self._require_image(index, file)
            self.workspace.resolve(image.path)
            caption_path = image.caption_path or image.path.with_suffix(".txt")
            self.workspace.resolve(caption_path)
            write_caption(caption_path, request, self.workspace)
            index.caption_changed(caption_path)
        return DatasetItemPage(total=1, offset=0, items=[build_item(index, file, crop_settings)])

    def uncaptioned_files(self, folder: Path) -> list[str]:
        """Return the images without a caption among those that have been read, sorted."""
        return sorted(
            name for name, row in self._index_of(folder).used_rows() if row.status == "uncaptioned"
        )

    def captions(self, name: str) -> list[tuple[str, ...]]:
        """Return the captions of each captioned image that has been read."""
        rows = self._refreshed_index(name).used_rows()
        return [row.captions for _, row in rows if row.captions]

    def caption_files(self, name: str, files: list[str] | None) -> list[tuple[str, Path]]:
        """Return (image, caption file) of the images that have one; of `files`, or of all.

        Images that share a caption file are listed once.
        """
        index = self._refreshed_index(name)
        wanted = index.images if files is None else dict.fromkeys(files)
        images_by_path: dict[Path, str] = {}
        for file in wanted:
            path = self._require_image(index, file).caption_path
            if path is not None:
                images_by_path.setdefault(self.workspace.resolve(path), file)
        return [(file, path) for path, file in images_by_path.items()]

    def image_sizes(self, folder: Path) -> set[ImageSize]:
        """Return the sizes in px of the usable images that have been read."""
        index = self._index_of(folder)
        boxes = index.choices.boxes
        return {
            boxes[name][2:] if name in boxes else row.size_px
            for name, row in index.used_rows()
            if row.problem is None
        }

    def some_captions(self, folder: Path, limit: int = 4) -> list[str]:
        """Return the captions of a few images, evenly spread over the dataset."""
        rows = self._index_of(folder).used_rows()
        captions = [row.captions[0] for _, row in rows if row.captions]
        stride = max(1, len(captions) // limit)
        return captions[::stride][:limit]

    def _index_of(self, folder: Path) -> ImageIndex:
        """Return the index of a folder, which need not be a dataset of the workspace."""
        real = self.workspace.resolve(folder)
        known = (name for (name, path) in self._indexes if path == real)
        name = next(known, f"folder-{run_id(real)}")
        return self._refreshed_index_of(name, real, READ_WAIT_S)

    def is_owned(self, name: str) -> bool:
        """Return True if the folder of the dataset is in the workspace's datasets folder."""
        datasets_dir = self.workspace.resolve_or_none(self.workspace.datasets_dir)
        return datasets_dir is not None and self._find_folder(name) == datasets_dir / name

    def begin_upload(self, name: str, file: str, length: int, limit: int) -> IncomingUpload:
        """Begin an upload into an owned dataset; see IncomingUpload. Raises ApiError."""
        from simpletuner.server.uploads import IncomingUpload

        folder = self.require_folder(name)
        if not self.is_owned(name):
            abort(
                409,
                "files can only be uploaded to datasets of the workspace; "
                f"copy them to {folder} instead",
            )
        return IncomingUpload(self.workspace, folder, file, length, limit)

    def invalidate(self, name: str) -> None:
        """Read the dataset's folder again at the next request."""
        index = self._indexes.get((name, self.require_folder(name)))
        if index is not None:
            index.invalidate()

    def added_folders(self) -> dict[str, str]:
        """Return the folders outside the workspace's datasets, by the names of their datasets."""
        return read_json_object(self.workspace.server_dir / "datasets.json") or {}

    def write_added_folders(self, folders: Mapping[str, str]) -> None:
        """Replace the list of added folders."""
        self.workspace.server_dir.mkdir(exist_ok=True)
        write_atomically(
            self.workspace.server_dir / "datasets.json", json.dumps(dict(folders), indent=1)
        )

    def exists(self, name: str) -> bool:
        """Return True if there is a dataset of this name, or anything where it would be."""
        own = self.workspace.datasets_dir / name
        return self._find_folder(name) is not None or os.path.lexists(own)

    def files_of_image(self, name: str, file: str) -> list[Path]:
        """Return the image and its caption file. Raises ApiError 404 for an unknown image."""
        index = self._refreshed_index(name)
        if file in index.rejected_names:
            return [self.workspace.resolve_below(index.folder, file)]
        image = self._require_image(index, file)
        return [image.path, *([image.caption_path] if image.caption_path else [])]

    def exclude(self, name: str, files: Sequence[str], excluded: bool) -> DatasetInfo:
        """Leave images out of all later runs, or use them again; the files stay as they are.

        Raises ApiError 404 for an unknown file.
        """
        index = self._refreshed_index(name)
        for file in files:
            if excluded or file not in index.choices.excluded:
                self._require_image(index, file)
        self.choices.exclude(index.folder, files, excluded)
        return self.get_info(name)

    def set_crop_box(
        self, name: str, file: str, box: CropBox | None, crop_settings: CropSettings
    ) -> DatasetItemPage:
        """Use a part of an image in later runs, or the whole; return the updated image.

        Raises ApiError: 404 for an unknown file, 422 for a box that does not fit the image.
        """
        index = self._refreshed_index(name)
        image = self._require_image(index, file)
        size = index.refresh_row(image).size_px
        if box is not None:
            try:
                read_crop_boxes({file: box})
                check_box(box, size)
            except (ConfigError, UnusableFile) as error:
                abort(422, str(error), "box")
        self.choices.set_box(index.folder, file, box if box != (0, 0, *size) else None)
        index = self._refreshed_index(name)
        return DatasetItemPage(total=1, offset=0, items=[build_item(index, file, crop_settings)])

    def _find_folder(self, name: str) -> Path | None:
        """Return the resolved folder of a dataset, or None if it is missing or not allowed."""
        if not DATASET_NAME.fullmatch(name):
            return None
        own = self.workspace.datasets_dir / name
        path = own if own.is_dir() else self.added_folders().get(name)
        folder = self.workspace.resolve_or_none(path) if path is not None else None
        return folder if folder is not None and folder.is_dir() else None

    def require_folder(self, name: str) -> Path:
        """Return the folder of a dataset. Raises ApiError 404."""
        return self._find_folder(name) or abort(404, "there is no such dataset")

    def _require_image(self, index: ImageIndex, file: str) -> ImageFile:
        return index.images.get(file) or abort(404, "there is no such image")

    def _refreshed_index(self, name: str, wait_s: float = READ_WAIT_S) -> ImageIndex:
        return self._refreshed_index_of(name, self.require_folder(name), wait_s)

    def _refreshed_index_of(self, name: str, folder: Path, wait_s: float) -> ImageIndex:
        from simpletuner.server.image_index import ImageIndex

        with self._lock:
            header_cache = self.workspace.server_dir / "datasets" / f"{name}.json"
            new_index = ImageIndex(self.workspace, name, folder, header_cache)
            index = self._indexes.setdefault((name, folder), new_index)
        index.apply_choices(self.choices.of(folder))
        index.refresh(wait_s)
        return index
