"""Images in a column of a parquet file, as the datasets of the Hugging Face Hub hold them.

A parquet file is read by row groups, so a few of them are kept decoded: an image is cheap as long
as the next ones are near it. Scanning and encoding go through a file in its order.
"""

from __future__ import annotations

import errno
import io
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from simpletuner.data.sources import ContentStamp, SourceFile
from simpletuner.data.table_rows import open_parquet
from simpletuner.errors import DataError

MIB = 1 << 20
MAX_DECODED_BYTES = 256 * MIB
PartAddress = tuple[str, int, int]  # cache key of the file, row group, part of it


class DecodedParts:
    """The parts of row groups that were decoded last. May be used from many threads."""

    def __init__(self, max_bytes: int = MAX_DECODED_BYTES) -> None:
        self.max_bytes = max_bytes
        self.lock = threading.Lock()
        self._parts: OrderedDict[PartAddress, list[bytes | None]] = OrderedDict()
        self._bytes = 0

    def get(self, address: PartAddress) -> list[bytes | None] | None:
        part = self._parts.get(address)
        if part is not None:
            self._parts.move_to_end(address)
        return part

    def add(self, address: PartAddress, part: list[bytes | None]) -> None:
        self._parts[address] = part
        self._bytes += _part_bytes(part)
        while self._bytes > self.max_bytes and len(self._parts) > 1:
            self._bytes -= _part_bytes(self._parts.popitem(last=False)[1])


class ImageColumn:
    """A column of images in one parquet file: bytes, or records with a field "bytes"."""

    def __init__(self, table: SourceFile, column: str, decoded: DecodedParts) -> None:
        self.table, self.column = table, column
        self._decoded = decoded
        self._groups: list[tuple[int, int, int]] | None = None  # first row, rows, bytes

    def read(self, row: int) -> bytes | None:
        """Return the file of an image, None where the cell is empty. Raises DataError."""
        with self._decoded.lock:
            groups = self._groups = self._groups or self._read_groups()
            group = next(n for n, (first, rows, _) in enumerate(groups) if row < first + rows)
            first, rows, size_bytes = groups[group]
            parts = max(1, -(-size_bytes // (self._decoded.max_bytes // 2)))
            rows_per_part = -(-rows // parts)
            part, inside = divmod(row - first, rows_per_part)
            address = (self.table.cache_key, group, part)
            cells = self._decoded.get(address)
            if cells is None:
                cells = self._read_part(group, part, rows_per_part)
                self._decoded.add(address, cells)
            return cells[inside]

    def _read_groups(self) -> list[tuple[int, int, int]]:
        groups = []
        first = 0
        with open_parquet(self.table) as parquet:
            for number in range(parquet.metadata.num_row_groups):
                group = parquet.metadata.row_group(number)
                groups.append((first, group.num_rows, group.total_byte_size))
                first += group.num_rows
        return groups

    def _read_part(self, group: int, part: int, rows_per_part: int) -> list[bytes | None]:
        with open_parquet(self.table) as parquet:
            batches = parquet.iter_batches(rows_per_part, row_groups=[group], columns=[self.column])
            for number, batch in enumerate(batches):
                if number == part:
                    return [_image_bytes(cell) for cell in batch.column(0).to_pylist()]
        raise DataError(f"{self.table.address} changed while it was read")


@dataclass(frozen=True, slots=True)
class EmbeddedImage(SourceFile):
    """An image in a row of a parquet file. place: unique, for messages. row: from 0."""

    place: str
    row: int
    images: ImageColumn = field(compare=False, repr=False)
    is_slow = True

    @property
    def name(self) -> str:
        return str(self.row)

    @property
    def address(self) -> str:
        return self.place

    @property
    def cache_key(self) -> str:
        inside = f"::{self.images.column}[{self.row}]"
        return self.images.table.cache_key + inside.encode().hex()

    def open(self) -> BinaryIO:
        try:
            content = self.images.read(self.row)
        except DataError as error:
            raise OSError(errno.EIO, str(error), self.address) from error
        if content is None:
            raise OSError(errno.ENODATA, "the row has no image", self.address)
        return io.BytesIO(content)

    def stamp(self) -> ContentStamp:
        """Return the stamp of the file."""
        return self.images.table.stamp()

    def size_bytes(self) -> int:
        with self.open() as stream:
            return len(stream.read())


def _image_bytes(cell: Any) -> bytes | None:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def _part_bytes(part: list[bytes | None]) -> int:
    return sum(len(content or b"") for content in part)
