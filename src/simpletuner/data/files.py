"""Which picture files a folder holds, by name alone."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simpletuner.data.dataset import Dataset
from simpletuner.data.types import Rejected
from simpletuner.errors import DataError

# Suffixes that mean a picture; those that cannot be decoded are listed as rejected, not passed over.
SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm",
    ".pgm", ".pnm", ".heic", ".heif", ".jxl", ".jp2", ".psd",
})  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A picture file by name. name: path inside the dataset, POSIX, NFC. text: its caption file, if any."""

    dataset: Dataset
    path: Path
    name: str
    text: Path | None


def find(dataset: Dataset) -> tuple[list[Found], list[Rejected]]:
    """Pictures of a folder by name, and those whose names cannot be used.

    Recursive, links followed once, hidden files and folders skipped. A caption file belongs to every picture
    of its stem; NFC and NFD spellings of the same name meet.
    """
    by_name: dict[str, list[Found]] = defaultdict(list)
    rejected: list[Rejected] = []
    for folder, inside, files in _walk(dataset.instance_data_dir):
        texts = {unicodedata.normalize("NFC", file): file for file in files if file.lower().endswith(".txt")}
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() not in SUFFIXES:
                continue
            raw = f"{inside}/{file}" if inside else file
            if any("\ud800" <= character <= "\udfff" for character in raw):
                detail = "the file name is not UTF-8; rename it"
                rejected.append(Rejected(ascii(raw)[1:-1], dataset.id, "file_name", detail))
                continue
            beside = f"{stem}.txt"
            text = beside if beside in files else texts.get(unicodedata.normalize("NFC", beside))
            name = unicodedata.normalize("NFC", raw)
            caption = Path(folder, text) if text is not None else None
            by_name[name].append(Found(dataset, Path(folder, file), name, caption))
    named: list[Found] = []
    for name, twins in by_name.items():
        if len(twins) == 1:
            named += twins
            continue
        detail = f"{len(twins)} files have this name in different Unicode spellings (NFC, NFD); rename one"
        rejected += [Rejected(name, dataset.id, "name_twins", detail)] * len(twins)
    return sorted(named, key=lambda item: item.name), rejected


def _walk(root: Path) -> Iterator[tuple[str, str, frozenset[str]]]:
    """(folder, path inside the root, files), hidden ones left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}")

    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        shown = frozenset(file for file in files if not file.startswith("."))
        yield folder, "" if inside == "." else inside, shown
