"""Captions of a folder from a table: CSV, JSONL or parquet, one row per image.

The rows are read one after the other, and only those of images in the folder are held in memory.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice

from simpletuner.data.dataset_config import CaptionTable
from simpletuner.data.sources import LocalFile, SourceFile
from simpletuner.data.table_rows import Row, read_rows
from simpletuner.errors import DataError

FILENAME_COLUMNS = ("filename", "file_name", "image", "path", "id")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")


def read_caption_table(
    table: CaptionTable, relative_paths: Iterable[str], file: SourceFile | None = None
) -> tuple[dict[str, tuple[str, ...]], str]:
    """Return the captions of each image that has a row, and a notice about unreadable rows or "".

    relative_paths: of the images in their folder, POSIX, NFC. A row names an image by its relative
    path, or by its file name, either with or without the suffix. Several rows of one image, and the
    items of a list in one cell, are alternatives. file: the table, where it is not a file of this
    machine. Raises DataError for a table that cannot be read or lacks a column, and MissingExtra
    for parquet without pyarrow.
    """
    keys = {path: _image_keys(path) for path in relative_paths}
    # A table may have millions of rows; only those of images in the folder are stored.
    wanted = {key for candidates in keys.values() for key in candidates}
    captions: dict[str, list[str]] = defaultdict(list)
    broken: list[int] = []
    columns: tuple[str, Sequence[str]] | None = None
    for number, row in read_rows(file or LocalFile(table.path), table.format):
        if row is None:
            broken.append(number)
            continue
        columns = columns or _choose_columns(table, row)
        key = unicodedata.normalize("NFC", str(row.get(columns[0]) or "")).removeprefix("./")
        if key in wanted:
            captions[key] += row_captions(row, columns[1], table.fallback_column)
    captions_by_path: dict[str, tuple[str, ...]] = {}
    for path, candidates in keys.items():
        # The most specific name that has rows: the path, and only then the file name alone.
        named = next((captions[key] for key in candidates if key in captions), [])
        if named:
            captions_by_path[path] = tuple(dict.fromkeys(named))
    notice = ""
    if broken:
        rows = "row" if len(broken) == 1 else "rows"
        notice = f"{table.path.name}: {len(broken)} {rows} cannot be read, the first is {broken[0]}"
    return captions_by_path, notice


def _image_keys(path: str) -> tuple[str, ...]:
    name = path.rpartition("/")[2]
    return path, os.path.splitext(path)[0], name, os.path.splitext(name)[0]


def _choose_columns(table: CaptionTable, row: Row) -> tuple[str, Sequence[str]]:
    """Return the column of file names and those of captions; the usual names unless given."""
    filename = table.filename_column or next((n for n in FILENAME_COLUMNS if n in row), None)
    captions = table.caption_columns or tuple(islice((n for n in CAPTION_COLUMNS if n in row), 1))
    missing = [name for name in (filename, *captions) if name is not None and name not in row]
    if filename is None or not captions or missing:
        lacking = (
            f"column {', '.join(missing)}" if missing else "columns of file names and captions"
        )
        raise DataError(
            f"{table.path}: has no {lacking}; it has {', '.join(map(str, row))}. "
            "Set filename_column and caption_column in caption_table"
        )
    return filename, captions


def row_captions(row: Row, columns: Sequence[str], fallback: str | None) -> list[str]:
    """Return the captions of a row; those of the fallback column where there are none."""
    for names in (columns, [fallback] if fallback else []):
        cells = [row.get(name) for name in names]
        texts = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]
        stripped = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
        if stripped:
            return stripped
    return []
