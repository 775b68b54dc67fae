"""A file of a server, read through its copy on this machine or in parts."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass, field
from typing import BinaryIO, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.sources import ContentStamp, FilePart, SeekableBytes, SourceFile
from simpletuner.data.transports import PartialDownload, TransferError, Transport

UNKNOWN_BYTES = -1
MAX_FILE_BYTES = 1 << 29  # of an image or a caption
BLOCK_BYTES = 1 << 20  # of a file that is read in parts


@dataclass(frozen=True, slots=True)
class RemoteFile(SourceFile):
    """A file behind an address that a transport reads.

    identity: stands for the file in caches; location: what the transport reads. version: from the
    listing; (UNKNOWN_BYTES, 0, 0) for an address out of a table, whose content is taken to be
    constant. max_bytes: a larger file is refused while it arrives. in_parts: never copied as a
    whole to be read in parts.
    """

    identity: str
    location: str = field(compare=False)
    transport: Transport = field(compare=False, repr=False)
    store: RemoteStore = field(compare=False, repr=False)
    version: ContentStamp = field(default=(UNKNOWN_BYTES, 0, 0), compare=False)
    max_bytes: int = field(default=MAX_FILE_BYTES, compare=False, repr=False)
    in_parts: bool = field(default=False, compare=False, repr=False)
    is_slow = True

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.location).path.rpartition("/")[2])

    @property
    def address(self) -> str:
        return printable_location(self.location)

    @property
    def cache_key(self) -> str:
        """A hash of the identity: the query of a URL may hold a signature."""
        return hashlib.sha256(self.identity.encode("utf-8", "surrogateescape")).hexdigest()

    def open(self) -> BinaryIO:
        return self.store.open(self, self._download, self.max_bytes)

    def stamp(self) -> ContentStamp:
        return self.version

    def size_bytes(self) -> int:
        if self.version[0] != UNKNOWN_BYTES:
            return self.version[0]
        with self.open() as stream:
            return stream.seek(0, os.SEEK_END)

    def open_part(self, offset: int, size: int) -> BinaryIO:
        """Open a range: of the copy where there is one or may be one, otherwise of the server."""
        if size > MAX_FILE_BYTES:
            raise TransferError("the part is too large", permanent=True)
        copy = self.store.open_copy(self)
        known = self.version[0]
        if copy is None and known != UNKNOWN_BYTES and self._is_worth_a_copy(known):
            copy = self.open()
        if copy is None:
            return io.BytesIO(self._read_range(offset, size))
        if os.fstat(copy.fileno()).st_size < offset + size:
            copy.close()
            raise TransferError("the file ends within this part", permanent=True)
        return cast(BinaryIO, io.BufferedReader(FilePart(copy, offset, size)))

    def open_lazily(self) -> BinaryIO:
        """Open the copy, or a stream that asks the server for the parts that are read."""
        copy = self.store.open_copy(self)
        if copy is not None:
            return copy
        size = self.version[0]
        if size == UNKNOWN_BYTES:
            size = self.store.request(self, lambda: self.transport.file_size(self.location))
        if self._is_worth_a_copy(size):
            return self.open()
        return cast(BinaryIO, RemoteParts(self, size))

    def _is_worth_a_copy(self, size_bytes: int) -> bool:
        return not self.in_parts and self.store.may_hold(size_bytes)

    def _download(self, partial: PartialDownload) -> None:
        expected = None if self.version[0] == UNKNOWN_BYTES else self.version[0]
        partial.expected_bytes = expected
        self.transport.download(self.location, partial)
        arrived = partial.file.tell()
        if expected not in (None, arrived):
            partial.restart()
            detail = f"{arrived} bytes arrived, but its listing says {expected}"
            raise TransferError(detail, permanent=False)

    def _read_range(self, offset: int, size: int) -> bytes:
        return self.store.request(
            self, lambda: self.transport.read_range(self.location, offset, size)
        )


class RemoteParts(SeekableBytes):
    """A stream over a file of a server; one block is in memory."""

    def __init__(self, file: RemoteFile, size: int) -> None:
        super().__init__(size)
        self.file = file
        self._block_start, self._block = 0, b""

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.size - self.position))
        done = 0
        while done < count:
            inside = self.position - self._block_start
            if not 0 <= inside < len(self._block):
                length = min(max(BLOCK_BYTES, count - done), self.size - self.position)
                self._block = self.file._read_range(self.position, length)
                self._block_start, inside = self.position, 0
            piece = self._block[inside : inside + count - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)
            self.position += len(piece)
        return done


def printable_location(location: str) -> str:
    """Return the address without what may be secret: user, password and query."""
    parts = urlsplit(location)
    host = parts.netloc.rpartition("@")[2]
    query = "..." if parts.query else ""
    return urlunsplit((parts.scheme, host, unquote(parts.path), query, ""))
