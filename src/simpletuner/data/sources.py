"""Sources of datasets: where files are listed and read.

A source lists folders of files; a file can be opened, and has a size, an address and a stamp that
changes with its content. Everything that reads images or captions does so through these two
classes. A folder of this machine is here, tar files in tar_source.py; source_types.py chooses.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from simpletuner.bounded_files import open_regular_file
from simpletuner.errors import DataError

ContentStamp = tuple[int, int, int]
IGNORED_FILES = ("Thumbs.db", "desktop.ini")


class SourceFile(ABC):
    """A file of a source. Files with the same address are equal, and can be keys of a dict."""

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
            content = stream.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise OSError(errno.EFBIG, f"is larger than {max_bytes} bytes", self.address)
        return content


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


@dataclass(frozen=True)
class LocalFile(SourceFile):
    """A file of this machine."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def address(self) -> str:
        return str(self.path)

    @property
    def cache_key(self) -> str:
        """The absolute path in hexadecimal digits: a POSIX name may hold any bytes."""
        return str(self.path.absolute()).encode("utf-8", "surrogateescape").hex()

    def open(self) -> BinaryIO:
        return open_regular_file(self.path)

    def stamp(self) -> ContentStamp:
        status = self.path.stat()
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
            if (status.st_dev, status.st_ino) in visited:
                subfolders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            inside = os.path.relpath(folder, self.root).replace(os.sep, "/")
            files: dict[str, SourceFile] = {
                name: LocalFile(Path(folder, name))
                for name in sorted(names)
                if not name.startswith(".") and name not in IGNORED_FILES
            }
            yield SourceFolder("" if inside == "." else inside, files)
