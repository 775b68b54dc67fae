"""Images that a table lists: by URL, by path, or in the table itself.

Rows are read one after the other; what stays in memory of a row is its image's address, captions,
size and weight.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any
from urllib.parse import unquote, urlsplit

from simpletuner.data.address_schemes import WEB_SCHEMES
from simpletuner.data.caption_tables import CAPTION_COLUMNS, row_captions
from simpletuner.data.dataset_config import ImageTable
from simpletuner.data.embedded_images import DecodedParts, EmbeddedImage, ImageColumn
from simpletuner.data.sources import RowSource, SourceFile, SourceRow, UnusableRow
from simpletuner.data.table_rows import Row, choose_column, open_parquet, read_columns, read_rows
from simpletuner.errors import DataError

IMAGE_COLUMNS = ("url", "image", "image_url", "filename", "file_name", "path", "image_path")
MAX_WEIGHT = 1000.0
MAX_SIDE_PX = 1 << 20
OpenUrl = Callable[[str], SourceFile]
OpenPath = Callable[[str, str], tuple[str, SourceFile]]


@dataclass
class TableSource(RowSource):
    """The images of one or several tables of the same columns.

    tables: (path inside the dataset, file, format). open_url: from an http or https address to the
    file. open_path: from the path of a table and one in its rows to the path inside the dataset and
    the file; raises ValueError with the reason for a path that is refused.
    """

    config: ImageTable
    tables: Sequence[tuple[str, SourceFile, str]]
    open_url: OpenUrl
    open_path: OpenPath
    _excluded: Counter[str] = field(default_factory=Counter)

    def rows(self) -> Iterator[SourceRow | UnusableRow]:
        decoded = DecodedParts()
        merged: dict[str, int] = {}
        rows: list[SourceRow | UnusableRow] = []
        for inside, table, table_format in self.tables:
            reader = self._reader(inside, table, table_format, decoded)
            for number, row in read_rows(table, table_format, reader.columns):
                result = reader.read(number, row)
                if isinstance(result, str):
                    self._excluded[result] += 1
                elif isinstance(result, UnusableRow):
                    rows.append(result)
                # A table may have one row for each caption of an image.
                elif (first := merged.get(result.relative_path)) is not None:
                    rows[first] = _add_captions(rows[first], result)
                else:
                    merged[result.relative_path] = len(rows)
                    rows.append(result)
        yield from rows

    def notices(self) -> list[str]:
        rows = {reason: count for reason, count in self._excluded.items() if count}
        return [
            f"{count} {'row' if count == 1 else 'rows'} left out by {reason}"
            for reason, count in sorted(rows.items())
        ]

    def check(self) -> None:
        """Read the columns of the first table. Raises DataError for one that is missing."""
        for inside, table, table_format in self.tables[:1]:
            self._reader(inside, table, table_format, DecodedParts())

    def _reader(
        self, inside: str, table: SourceFile, table_format: str, decoded: DecodedParts
    ) -> _RowReader:
        config = self.config
        columns = read_columns(table, table_format)
        image = choose_column(config.image_column, IMAGE_COLUMNS, columns, "image", table.address)
        usual = [name for name in CAPTION_COLUMNS if name in columns][:1]
        captions = config.caption_columns or tuple(usual)
        optional = (
            config.fallback_column,
            config.width_column,
            config.height_column,
            config.weight_column,
        )
        missing = [name for name in (*captions, *optional) if name and name not in columns]
        if missing or (not captions and config.needs_captions):
            lacking = f"column {', '.join(missing)}" if missing else "column of captions"
            raise DataError(
                f"{table.address}: has no {lacking}; it has {', '.join(columns)}. Name the columns "
                "in the fields of the dataset"
            )
        embedded = table_format == "parquet" and _is_embedded(table, image)
        cells = {*captions, *filter(None, optional), *config.filters.columns}
        return _RowReader(
            self,
            inside,
            table,
            image,
            captions,
            cells if embedded else cells | {image},
            ImageColumn(table, image, decoded) if embedded else None,
        )


@dataclass
class _RowReader:
    """The columns of one table. columns: those that are read row by row."""

    source: TableSource
    inside: str
    table: SourceFile
    image: str
    captions: tuple[str, ...]
    columns: set[str]
    embedded: ImageColumn | None

    def read(self, number: int, row: Row | None) -> SourceRow | UnusableRow | str:
        """Return the image of a row, why it cannot be used, or the filter that leaves it out."""
        where = f"{self.inside}/{number}" if self.inside else str(number)
        if row is None:
            return UnusableRow(where, "the row cannot be read")
        config = self.source.config
        excluded = config.filters.excluding(row)
        if excluded:
            return excluded
        try:
            path, file = self._image(where, number, row)
            size = _read_size(row, config.width_column, config.height_column)
            weight = _read_weight(row, config.weight_column)
        except ValueError as error:
            return UnusableRow(where, str(error))
        if weight == 0:
            return "weight 0"
        captions = tuple(dict.fromkeys(row_captions(row, self.captions, config.fallback_column)))
        return SourceRow(path, file, captions, size if file.is_slow else None, weight)

    def _image(self, where: str, number: int, row: Row) -> tuple[str, SourceFile]:
        if self.embedded is not None:
            address = f"{self.table.address}::{self.image}[{number - 1}]"
            # The number of the row is its path: images in a table have no names.
            return where, EmbeddedImage(address, number - 1, self.embedded)
        cell = row.get(self.image)
        if not isinstance(cell, str) or not cell.strip():
            raise ValueError(f"column {self.image} names no image")
        text = cell.strip()
        scheme = urlsplit(text).scheme if "://" in text else ""
        if scheme in WEB_SCHEMES:
            return url_path(text), self.source.open_url(text)
        if scheme:
            raise ValueError(f"{scheme}: addresses are not read from a table, only http and https")
        return self.source.open_path(self.inside, text)


def url_path(url: str) -> str:
    """Return a path that stands for a URL: host and path, and a hash of the query."""
    parts = urlsplit(url)
    # Without user name and password, because the path is shown and stored.
    host = parts.netloc.rpartition("@")[2]
    path = unicodedata.normalize("NFC", unquote(f"{host}{parts.path}"))
    # Many servers name the image in the query, which may hold secrets too: only its hash.
    query = f"~{sha256(parts.query.encode()).hexdigest()[:12]}" if parts.query else ""
    return "".join(c if c.isprintable() else "_" for c in path) + query


def _is_embedded(table: SourceFile, column: str) -> bool:
    with open_parquet(table) as parquet:
        kind = str(parquet.schema_arrow.field(column).type)
    return kind.startswith(("struct", "binary", "large_binary", "fixed_size_binary"))


def _add_captions(first: SourceRow | UnusableRow, other: SourceRow) -> SourceRow:
    assert isinstance(first, SourceRow)
    captions = tuple(dict.fromkeys((*first.captions, *other.captions)))
    return replace(first, captions=captions)


def _read_size(row: Row, width: str | None, height: str | None) -> tuple[int, int] | None:
    if width is None or height is None:
        return None
    sides = [_read_number(row.get(name), name) for name in (width, height)]
    if any(side is None for side in sides):
        return None
    if not all(1 <= side <= MAX_SIDE_PX and side == int(side) for side in sides if side):
        raise ValueError(f"{width} and {height} are not a size in pixels")
    return int(sides[0] or 0), int(sides[1] or 0)


def _read_weight(row: Row, name: str | None) -> float:
    weight = _read_number(row.get(name), name) if name is not None else 1.0
    if weight is None:
        return 1.0
    if not 0 <= weight <= MAX_WEIGHT:
        raise ValueError(f"{name} is not between 0 and {MAX_WEIGHT:g}")
    return weight


def _read_number(cell: Any, name: str) -> float | None:
    if cell is None or cell == "":
        return None
    try:
        number = float(cell)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is not a number")
    return number
