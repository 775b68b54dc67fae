"""Images and captions in tar files, as webdataset writes them: files of one stem are one sample.

Nothing is extracted: a file is read where it is in its tar.
"""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from simpletuner.bounded_files import open_regular_file
from simpletuner.data.sources import (
    ContentStamp,
    DatasetSource,
    LocalFolder,
    SourceFile,
    SourceFolder,
)
from simpletuner.errors import DataError

TAR_SUFFIX = ".tar"


@dataclass(frozen=True)
class TarMember(SourceFile):
    """A file in a tar. offset, size: of its content in the tar, in bytes."""

    tar: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def address(self) -> str:
        return f"{self.tar}::{self.member}"

    @property
    def cache_key(self) -> str:
        address = f"{self.tar.absolute()}::{self.member}"
        return address.encode("utf-8", "surrogateescape").hex()

    def open(self) -> BinaryIO:
        file = open_regular_file(self.tar)
        if os.fstat(file.fileno()).st_size < self.offset + self.size:
            file.close()
            raise OSError(errno.EIO, "the tar ends within this file", self.address)
        part = _FilePart(file, self.offset, self.size)
        return cast(BinaryIO, io.BufferedReader(part))

    def stamp(self) -> ContentStamp:
        """Return the size of the file, and the time and inode of its tar."""
        status = self.tar.stat()
        return self.size, status.st_ctime_ns, status.st_ino


class _FilePart(io.RawIOBase):
    """A range of bytes of an open file, which it closes."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.size - self.position))
        self.file.seek(self.offset + self.position)
        content = self.file.read(count)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


@dataclass(frozen=True)
class TarFolder(DatasetSource):
    """Every .tar below a folder of this machine; compressed ones are not read."""

    root: Path

    def folders(self) -> Iterator[SourceFolder]:
        for folder in LocalFolder(self.root).folders():
            for name in folder.files:
                if os.path.splitext(name)[1].lower() == TAR_SUFFIX:
                    inside = f"{folder.inside}/{name}" if folder.inside else name
                    yield from _tar_folders(self.root / inside, inside)


def _tar_folders(tar: Path, inside: str) -> list[SourceFolder]:
    """Return the folders of one tar. Of two files of one name the later counts, as in any tar.

    A tar that was cut off gives the files before the cut, and one that cannot be opened.
    """
    files: dict[str, dict[str, SourceFile]] = defaultdict(dict)
    try:
        with open_regular_file(tar) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for entry in archive:
                member = entry.name.removeprefix("./")
                parts = member.split("/")
                if entry.isreg() and not any(part.startswith(".") for part in parts):
                    folder = "/".join((inside, *parts[:-1]))
                    files[folder][parts[-1]] = TarMember(tar, member, entry.offset_data, entry.size)
    except (tarfile.TarError, OSError) as error:
        if files and isinstance(error, tarfile.ReadError):
            return _sorted_folders(files)
        raise DataError(f"{tar} cannot be read as a tar file: {error}") from error
    return _sorted_folders(files)


def _sorted_folders(files: Mapping[str, dict[str, SourceFile]]) -> list[SourceFolder]:
    return [SourceFolder(folder, members) for folder, members in sorted(files.items())]
