"""Sources of datasets: where files are listed and read.

A source lists folders of files, or the rows of a table; a file can be opened, and has a size, an
address and a stamp that changes with its content. Everything that reads images or captions does so
through these classes. A folder of this machine is here; source_types.py chooses among all sources.
"""

from __future__ import annotations

import errno
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, cast

from simpletuner.bounded_files import open_regular_file
from simpletuner.errors import DataError

ContentStamp = tuple[int, int, int]
IGNORED_FILES = ("Thumbs.db", "desktop.ini")


class SourceFile(ABC):
    """A file of a source. Files with the same address are equal, and can be keys of a dict.

    is_slow: reading it may need a network or much work, so that what was found out is remembered.
    """

    __slots__ = ()
    is_slow: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of the address: "cat.png"."""

    @property
    @abstractmethod
    def address(self) -> str:
        """The unique address, as messages show it: an absolute path, a URL, ..."""

    @property
    @abstractmethod
    def cache_key(self) -> str:
        """ASCII text that stands for the address in an index on disk; the same in every run."""

    @abstractmethod
    def open(self) -> BinaryIO:
        """Open the file for reading. The stream can seek. Raises OSError."""

    @abstractmethod
    def stamp(self) -> ContentStamp:
        """Return (bytes, time of the last change in ns, inode or 0). Raises OSError.

        A hash of the content that was stored with an equal stamp is still valid. The time is one
        that programs cannot set back, where the source has such a time.
        """

    def open_part(self, offset: int, size: int) -> BinaryIO:
        """Open a range of bytes, as a stream of its own. Raises OSError where the file is shorter.

        A file that is slow to read in parts is not asked for more than the range.
        """
        file = self.open()
        # At the opening: a decoder would report a short file as a damaged image.
        if file.seek(0, os.SEEK_END) < offset + size:
            file.close()
            raise OSError(errno.EIO, "the file ends within this part", self.address)
        return cast(BinaryIO, io.BufferedReader(FilePart(file, offset, size)))

    def open_lazily(self) -> BinaryIO:
        """Open the file for reading few parts of it. Raises OSError."""
        return self.open()

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return os.path.splitext(self.name)[0]

    def size_bytes(self) -> int:
        """Return the length of the content. Raises OSError."""
        return self.stamp()[0]

    def read_bytes(self, max_bytes: int) -> bytes:
        """Return the whole content. Raises OSError, also for a larger file."""
        with self.open() as stream:
            # One byte more than allowed shows that the file is larger.
            content = stream.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise OSError(errno.EFBIG, f"is larger than {max_bytes} bytes", self.address)
        return content


class SeekableBytes(io.RawIOBase):
    """A readable stream of a known size; a subclass reads from `position`."""

    def __init__(self, size: int) -> None:
        self.size, self.position = size, 0

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


class FilePart(SeekableBytes):
    """A range of bytes of an open file, which it closes."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        super().__init__(size)
        self.file, self.offset = file, offset

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
class SourceFolder:
    """One folder of a source.

    inside: its path in the source, POSIX, "" at the top. files: by name.
    """

    inside: str
    files: Mapping[str, SourceFile]


class DatasetSource(ABC):
    """A tree of folders."""

    @abstractmethod
    def folders(self) -> Iterator[SourceFolder]:
        """Yield every folder once, hidden files and folders left out. Raises DataError."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """An image of a table, with what its row says.

    relative_path: unique in the table, POSIX, NFC. size_px: None where the row gives none. weight:
    how often the image is used, relative to the others.
    """

    relative_path: str
    file: SourceFile
    captions: tuple[str, ...]
    size_px: tuple[int, int] | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class UnusableRow:
    """A row that cannot be used. path: of its image, or the number of the row."""

    path: str
    detail: str


class RowSource(ABC):
    """Images that are the rows of a table."""

    @abstractmethod
    def rows(self) -> Iterator[SourceRow | UnusableRow]:
        """Yield every row once, in the order of the table. Raises DataError."""

    @abstractmethod
    def notices(self) -> list[str]:
        """Return what the user should know about the rows, after they were read."""


class LocalFile(SourceFile):
    """A file of this machine.

    It holds two texts, of which the files of a folder share the first one: a Path needs many times
    the memory, and a dataset has two files per image.
    """

    __slots__ = ("_folder", "_name")

    def __init__(self, path: Path | str, name: str | None = None) -> None:
        """Refer to the file at `path`, or to the file `name` in the folder `path`."""
        if name is None:
            self._folder, self._name = os.path.split(os.fspath(path))
        else:
            self._folder, self._name = os.fspath(path), name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalFile) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __repr__(self) -> str:
        return f"LocalFile({self.address!r})"

    @property
    def path(self) -> Path:
        return Path(self.address)

    @property
    def name(self) -> str:
        return self._name

    @property
    def address(self) -> str:
        return os.path.join(self._folder, self._name)

    @property
    def cache_key(self) -> str:
        """The absolute path in hexadecimal digits: a POSIX name may hold any bytes."""
        return str(self.path.absolute()).encode("utf-8", "surrogateescape").hex()

    def open(self) -> BinaryIO:
        # Not self.path: the names of ten thousand Paths stay in memory as interned strings.
        return open_regular_file(self.address)

    def stamp(self) -> ContentStamp:
        status = os.stat(self.address)
        return status.st_size, status.st_ctime_ns, status.st_ino


@dataclass(frozen=True)
class LocalFolder(DatasetSource):
    """A folder of this machine. Links are followed once."""

    root: Path

    def folders(self) -> Iterator[SourceFolder]:
        def refuse(error: OSError) -> None:
            raise DataError(f"{error.filename}: {error.strerror}")

        visited: set[tuple[int, int]] = set()
        for folder, subfolders, names in os.walk(self.root, onerror=refuse, followlinks=True):
            status = os.stat(folder)
            # A link to a folder above would be walked without end. By number, since it has many
            # paths.
            if (status.st_dev, status.st_ino) in visited:
                subfolders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            # In place, because os.walk reads this list next; sorted, because disks have orders of
            # their own.
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            inside = os.path.relpath(folder, self.root).replace(os.sep, "/")
            files: dict[str, SourceFile] = {
                name: LocalFile(folder, name)
                for name in sorted(names)
                if not name.startswith(".") and name not in IGNORED_FILES
            }
            yield SourceFolder("" if inside == "." else inside, files)
