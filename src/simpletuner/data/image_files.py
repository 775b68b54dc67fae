"""The image files of a dataset, found by name only."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.image_suffixes import IMAGE_SUFFIXES
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.sample_types import RejectedFile, SampleMask
from simpletuner.data.source_types import dataset_source
from simpletuner.data.sources import (
    LocalFile,
    RowSource,
    SourceFile,
    SourceFolder,
    SourceRow,
    UnusableRow,
)
from simpletuner.events.event_types import Emit
from simpletuner.events.sinks import null_emit

MASK_ENDING = ".mask"  # before the suffix: photo.mask.png is the mask of photo.png


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file by name, with its caption file and its mask if there are any.

    relative_path: path inside the dataset, POSIX, NFC. row: what its row of a table says, for an
    image that a table lists.
    """

    dataset: DatasetConfig
    file: SourceFile
    relative_path: str
    caption_file: SourceFile | None
    row: SourceRow | None = None
    mask: SampleMask | None = None

    @property
    def path(self) -> Path:
        """The path of an image on this machine."""
        return _local_path(self.file)

    @property
    def caption_path(self) -> Path | None:
        """The path of a caption file on this machine."""
        return None if self.caption_file is None else _local_path(self.caption_file)


def _local_path(file: SourceFile) -> Path:
    if not isinstance(file, LocalFile):
        raise TypeError(f"{file.address} is not a file of this machine")
    return file.path


@dataclass
class _FoundFiles:
    """Files of a dataset, collected folder by folder."""

    by_name: dict[str, list[ImageFile]]
    rejected: list[RejectedFile]
    other_kinds: Counter[str]
    notices: list[str] = field(default_factory=list)


def find_image_files(
    dataset: DatasetConfig, store: RemoteStore | None = None, emit: Emit = null_emit
) -> tuple[list[ImageFile], list[RejectedFile], Counter[str], list[str]]:
    """Return the images by name, the files whose names cannot be used, and a count of other files.

    A caption file belongs to every image of its stem, and so does a mask, `photo.mask.png`; NFC and
    NFD spellings of the same name match, as do .txt and .TXT. The count is by suffix. The last
    value is notices. store: for datasets that are not a folder of this machine.
    """
    listing = _FoundFiles(defaultdict(list), [], Counter())
    source = dataset_source(dataset, store, emit)
    if isinstance(source, RowSource):
        _add_rows(dataset, source, listing)
    else:
        for folder in source.folders():
            _add_folder(dataset, folder, listing)
    for name, images in listing.by_name.items():
        if len(images) > 1:
            detail = (
                f"{len(images)} files have this name in different Unicode spellings (NFC, NFD); "
                "rename one"
            )
            twin = RejectedFile(name, dataset.id, "name_twins", detail)
            listing.rejected += [twin] * len(images)
    excluded = set(dataset.choices.excluded)
    listing.rejected += [
        RejectedFile(name, dataset.id, "excluded", "is listed in exclude")
        for name in sorted(excluded & listing.by_name.keys())
    ]
    listing.notices += dataset.choices.describe_unknown(listing.by_name.keys())
    named = [
        images[0]
        for name, images in sorted(listing.by_name.items())
        if len(images) == 1 and name not in excluded
    ]
    return named, listing.rejected, +listing.other_kinds, listing.notices


def _add_rows(dataset: DatasetConfig, source: RowSource, listing: _FoundFiles) -> None:
    for row in source.rows():
        if isinstance(row, UnusableRow):
            listing.rejected.append(RejectedFile(row.path, dataset.id, "table_row", row.detail))
        else:
            image = ImageFile(dataset, row.file, row.relative_path, None, row)
            listing.by_name[row.relative_path].append(image)
    listing.notices += source.notices()


def _add_folder(dataset: DatasetConfig, folder: SourceFolder, listing: _FoundFiles) -> None:
    parts = [(name, *os.path.splitext(name)) for name in folder.files]
    captions = {
        _normalize_nfc(stem): name for name, stem, suffix in parts if suffix.lower() == ".txt"
    }
    mask_names = {
        name
        for name, stem, suffix in parts
        if dataset.dataset_type != "conditioning" and _is_mask(stem, suffix)
    }
    masks = {
        _normalize_nfc(stem[: -len(MASK_ENDING)]): SampleMask(folder.files[name], "luminance")
        for name, stem, _ in parts
        if name in mask_names
    }
    unused_captions, unused_masks = set(captions), set(masks)
    for name, stem, suffix in parts:
        if name in mask_names:
            continue
        if suffix.lower() not in IMAGE_SUFFIXES:
            if suffix.lower() != ".txt":
                listing.other_kinds[suffix.lower() or name] += 1
            continue
        unused_captions.discard(_normalize_nfc(stem))
        unused_masks.discard(_normalize_nfc(stem))
        raw = f"{folder.inside}/{name}" if folder.inside else name
        if any("\ud800" <= character <= "\udfff" for character in raw):
            detail = "the file name is not UTF-8; rename it"
            listing.rejected.append(RejectedFile(ascii(raw)[1:-1], dataset.id, "file_name", detail))
            continue
        exact = f"{stem}.txt"
        caption = exact if exact in folder.files else captions.get(_normalize_nfc(stem))
        caption_file = folder.files[caption] if caption is not None else None
        relative_path = _normalize_nfc(raw)
        listing.by_name[relative_path].append(
            ImageFile(
                dataset,
                folder.files[name],
                relative_path,
                caption_file,
                mask=masks.get(_normalize_nfc(stem)),
            )
        )
    if unused_captions:
        listing.other_kinds[".txt without an image"] += len(unused_captions)
    if unused_masks:
        listing.other_kinds["mask without an image"] += len(unused_masks)


def _is_mask(stem: str, suffix: str) -> bool:
    """Return whether this is the name of a mask next to an image."""
    return suffix.lower() in IMAGE_SUFFIXES and stem.lower().endswith(MASK_ENDING)


def _normalize_nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
