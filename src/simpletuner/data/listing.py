"""Listings of remote folders: paged, remembered, continued after an interruption."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from simpletuner.data.rejections import make_printable
from simpletuner.data.remote_file import MAX_FILE_BYTES, RemoteFile
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.sources import IGNORED_FILES, DatasetSource, SourceFile, SourceFolder
from simpletuner.data.transports import TransferError, Transport
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit, WarningIssued

UNFINISHED = "#unfinished"
CONTAINER_SUFFIXES = (".tar", ".parquet", ".jsonl", ".csv")  # may be larger than an image
STAMP = "listing 1"  # of the format in the index


class ListedFile(NamedTuple):
    """A file of a listing. path: inside the folder. version: a number that changes with it."""

    path: str
    size_bytes: int
    version: int


@dataclass(frozen=True)
class Page:
    """A part of a listing. follow_up: what a lister needs to know of it for the next page."""

    files: tuple[ListedFile, ...]
    follow_up: tuple[str, ...] = ()


class Lister(ABC):
    """One pass over a listing. Only follow() changes it, so that a failed request is repeated."""

    is_complete = False

    @abstractmethod
    def next_page(self) -> Page:
        """Request the next page. Raises TransferError."""

    @abstractmethod
    def follow(self, page: Page) -> None:
        """Go behind a page, which was requested now or in an earlier start."""


def version_number(tag: str) -> int:
    """Return a number for an ETag or a time, which fits into a stamp."""
    return int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7], "big")


@dataclass(frozen=True)
class RemoteFolder(DatasetSource):
    """A folder of a server.

    address: for messages. identity: stands for the folder in caches. locate: from a path inside to
    the location for the transport. lister: begins a listing. listed: its result, where it was made
    already. chosen: the paths that are used; None is all. in_parts: of the files (RemoteFile).
    """

    address: str
    identity: str
    transport: Transport
    store: RemoteStore
    locate: Callable[[str], str]
    lister: Callable[[], Lister]
    emit: Emit
    listed: tuple[ListedFile, ...] | None = None
    chosen: frozenset[str] | None = None
    in_parts: bool = False

    def folders(self) -> Iterator[SourceFolder]:
        files: dict[str, dict[str, SourceFile]] = defaultdict(dict)
        for listed in self.list_files():
            folder, _, name = listed.path.rpartition("/")
            hidden = any(part.startswith(".") for part in listed.path.split("/"))
            if name and not hidden and name not in IGNORED_FILES:
                files[folder][name] = self.file(listed)
        for folder in sorted(files):
            yield SourceFolder(folder, dict(sorted(files[folder].items())))

    def file(self, listed: ListedFile) -> RemoteFile:
        is_container = listed.path.lower().endswith(CONTAINER_SUFFIXES)
        return RemoteFile(
            identity=f"{self.identity}/{listed.path}",
            location=self.locate(listed.path),
            transport=self.transport,
            store=self.store,
            version=(listed.size_bytes, listed.version, 0),
            max_bytes=max(MAX_FILE_BYTES, listed.size_bytes if is_container else 0),
            in_parts=self.in_parts,
        )

    def list_files(self) -> list[ListedFile]:
        """Return the files that are used. Raises DataError."""
        listed = self.listed
        if listed is None:
            listed = tuple(file for page in self.list_pages() for file in page.files)
        return [file for file in listed if self.chosen is None or file.path in self.chosen]

    def list_pages(self) -> list[Page]:
        """Return the complete listing. Raises DataError for a folder that cannot be listed.

        While the server cannot be reached, the last complete listing is used, with a warning.
        """
        index = self.store.index
        unfinished = self.identity + UNFINISHED
        pages = [_read_page(part) for part in index.find_parts(unfinished, STAMP)]
        lister = self.lister()
        for page in pages:
            lister.follow(page)
        try:
            while not lister.is_complete:
                page = self.store.retry(self.address, lister.next_page)
                content = [page.files, page.follow_up]
                index.remember_part(unfinished, len(pages), STAMP, content)
                pages.append(page)
                lister.follow(page)
        except TransferError as error:
            return self._remembered(error)
        index.rename_parts(unfinished, self.identity)
        return pages

    def _remembered(self, error: TransferError) -> list[Page]:
        parts = self.store.index.find_parts(self.identity, STAMP)
        if error.permanent or not parts:
            raise DataError(f"{self.address} cannot be listed: {error.strerror}") from error
        text = f"{self.address} cannot be listed ({error.strerror}); its last listing is used"
        self.emit(WarningIssued(make_printable(text)))
        return [_read_page(part) for part in parts]


def _read_page(part: Any) -> Page:
    files, follow_up = part
    return Page(tuple(ListedFile(*file) for file in files), tuple(follow_up))
