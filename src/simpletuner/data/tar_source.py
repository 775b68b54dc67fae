"""Images and captions in tar files, as webdataset writes them: files of one stem are one sample.

Nothing is extracted: a file is read where it is in its tar. What is in a tar is read from its
headers once, and remembered in the cache folder.
"""

from __future__ import annotations

import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from simpletuner.data.file_facts import FileFactsIndex
from simpletuner.data.sources import (
    ContentStamp,
    DatasetSource,
    SourceFile,
    SourceFolder,
)
from simpletuner.errors import DataError

TAR_SUFFIX = ".tar"
Member = tuple[str, int, int]  # path, offset of the content, size


@dataclass(frozen=True, slots=True)
class TarMember(SourceFile):
    """A file in a tar. offset, size: of its content in the tar, in bytes."""

    tar: SourceFile
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def address(self) -> str:
        return f"{self.tar.address}::{self.member}"

    @property
    def cache_key(self) -> str:
        return self.tar.cache_key + f"::{self.member}".encode("utf-8", "surrogateescape").hex()

    def open(self) -> BinaryIO:
        return self.tar.open_part(self.offset, self.size)

    def stamp(self) -> ContentStamp:
        """Return the size of the file, and the time and inode of its tar."""
        # Changing a member rewrites the tar, so its time and inode stand for all of them.
        _, changed, inode = self.tar.stamp()
        return self.size, changed, inode


@dataclass(frozen=True, slots=True)
class RemoteTarMember(TarMember):
    """A file in a tar of a server."""

    is_slow = True


@dataclass(frozen=True)
class TarFiles(DatasetSource):
    """Every .tar of another source; compressed ones are not read.

    index: remembers what is in each tar; None reads the headers each time.
    """

    archives: DatasetSource
    index: FileFactsIndex | None = None

    def folders(self) -> Iterator[SourceFolder]:
        for folder in self.archives.folders():
            for name, tar in folder.files.items():
                if os.path.splitext(name)[1].lower() == TAR_SUFFIX:
                    inside = f"{folder.inside}/{name}" if folder.inside else name
                    yield from _tar_folders(tar, inside, self._members(tar))

    def _members(self, tar: SourceFile) -> list[Member]:
        try:
            stamp = ",".join(map(str, tar.stamp()))
        except OSError as error:
            raise _unreadable_tar(tar, error) from error
        if self.index is None:
            return _read_headers(tar)
        remembered = self.index.find_parts(tar.cache_key, stamp)
        if not remembered:
            members = _read_headers(tar)
            self.index.remember_part(tar.cache_key, 0, stamp, members)
            return members
        return [(member, offset, size) for member, offset, size in remembered[0]]


def _tar_folders(tar: SourceFile, inside: str, members: list[Member]) -> list[SourceFolder]:
    """Return the folders of one tar. Of two files of one name the later counts, as in any tar."""
    kind = RemoteTarMember if tar.is_slow else TarMember
    files: dict[str, dict[str, SourceFile]] = defaultdict(dict)
    for member, offset, size in members:
        *parents, name = member.split("/")
        files["/".join((inside, *parents))][name] = kind(tar, member, offset, size)
    return _sorted_folders(files)


def _read_headers(tar: SourceFile) -> list[Member]:
    """Return the regular files that are not hidden.

    A tar that was cut off gives the files before the cut, and one that cannot be opened.
    """
    members: list[Member] = []
    try:
        with tar.open_lazily() as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for entry in archive:
                member = entry.name.removeprefix("./")
                hidden = any(part.startswith(".") for part in member.split("/"))
                if entry.isreg() and not hidden:
                    members.append((member, entry.offset_data, entry.size))
    except (tarfile.TarError, OSError) as error:
        # A download that was cut off still has its first images; other errors may pass.
        if not members or not isinstance(error, tarfile.ReadError):
            raise _unreadable_tar(tar, error) from error
    return members


def _unreadable_tar(tar: SourceFile, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) else error
    return DataError(f"{tar.address} cannot be read as a tar file: {reason or error}")


def _sorted_folders(files: Mapping[str, dict[str, SourceFile]]) -> list[SourceFolder]:
    return [SourceFolder(folder, members) for folder, members in sorted(files.items())]
