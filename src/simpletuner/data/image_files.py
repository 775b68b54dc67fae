"""Which picture files a folder holds, by name alone."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.sample_types import RejectedFile
from simpletuner.errors import DataError

# Suffixes that mean a picture; those that cannot be decoded are listed as rejected, not passed
# over.
IMAGE_SUFFIXES = frozenset(
    {
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
        ".ppm",
        ".pgm",
        ".pnm",
        ".heic",
        ".heif",
        ".jxl",
        ".jp2",
        ".psd",
    }
)
IGNORED_FILES = ("Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class ImageFile:
    """A picture file by name. name: path inside the dataset, POSIX, NFC. text: its caption file, if any."""

    dataset: DatasetConfig
    path: Path
    relative_path: str
    caption_path: Path | None


def find_image_files(
    dataset: DatasetConfig,
) -> tuple[list[ImageFile], list[RejectedFile], Counter[str]]:
    """Pictures of a folder by name, those whose names cannot be used, and how many other files of each kind.

    Recursive, links followed once, hidden files and folders skipped. A caption file belongs to every picture
    of its stem; NFC and NFD spellings of the same name meet, as do .txt and .TXT.
    """
    by_name: dict[str, list[ImageFile]] = defaultdict(list)
    rejected: list[RejectedFile] = []
    unread: Counter[str] = Counter()
    for folder, inside, files in _walk_visible(dataset.instance_data_dir):
        parts = [(file, *os.path.splitext(file)) for file in sorted(files)]
        texts = {
            _normalize_nfc(stem): file for file, stem, suffix in parts if suffix.lower() == ".txt"
        }
        alone = set(texts)
        for file, stem, suffix in parts:
            if suffix.lower() not in IMAGE_SUFFIXES:
                unread[suffix.lower() or file] += suffix.lower() != ".txt"
                continue
            alone.discard(_normalize_nfc(stem))
            raw = f"{inside}/{file}" if inside else file
            if any("\ud800" <= character <= "\udfff" for character in raw):
                detail = "the file name is not UTF-8; rename it"
                rejected.append(RejectedFile(ascii(raw)[1:-1], dataset.id, "file_name", detail))
                continue
            text = f"{stem}.txt" if f"{stem}.txt" in files else texts.get(_normalize_nfc(stem))
            caption = Path(folder, text) if text is not None else None
            by_name[_normalize_nfc(raw)].append(
                ImageFile(dataset, Path(folder, file), _normalize_nfc(raw), caption)
            )
        unread[".txt without a picture"] += len(alone)
    for name, twins in by_name.items():
        if len(twins) > 1:
            detail = f"{len(twins)} files have this name in different Unicode spellings (NFC, NFD); rename one"
            rejected += [RejectedFile(name, dataset.id, "name_twins", detail)] * len(twins)
    named = [twins[0] for _, twins in sorted(by_name.items()) if len(twins) == 1]
    return named, rejected, +unread


def _normalize_nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _walk_visible(root: Path) -> Iterator[tuple[str, str, frozenset[str]]]:
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
        shown = frozenset(
            file for file in files if not file.startswith(".") and file not in IGNORED_FILES
        )
        yield folder, "" if inside == "." else inside, shown
