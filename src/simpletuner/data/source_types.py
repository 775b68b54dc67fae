"""The source of a dataset: a folder, tar files or a table, on this machine or on a server."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from simpletuner.data.address_schemes import WEB_SCHEMES
from simpletuner.data.dataset_config import (
    CaptionTable,
    DatasetConfig,
    ImageTable,
    StoreLocation,
)
from simpletuner.data.http_transport import HttpTransport
from simpletuner.data.hub_dataset import find_hub_files
from simpletuner.data.listing import RemoteFolder
from simpletuner.data.object_store import ObjectTransport
from simpletuner.data.remote_file import RemoteFile
from simpletuner.data.remote_store import GIB, RemoteStore
from simpletuner.data.sources import (
    DatasetSource,
    LocalFile,
    LocalFolder,
    RowSource,
    SourceFile,
    SourceFolder,
)
from simpletuner.data.table_source import TableSource
from simpletuner.data.tar_source import TarFiles
from simpletuner.data.transports import TransferError
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit

MAX_TABLE_BYTES = 64 * GIB
MAX_SHARDS = 100_000
SHARD_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def dataset_source(
    dataset: DatasetConfig, store: RemoteStore | None, emit: Emit
) -> DatasetSource | RowSource:
    """Return the source of a dataset's images.

    store: needed for everything but files in a folder of this machine. Raises DataError for what
    cannot be reached or lacks a column, MissingExtra for a driver that is not installed.
    """
    if dataset.has_folder:
        folder = LocalFolder(dataset.instance_data_dir)
        if dataset.type != "webdataset":
            return folder
        return TarFiles(folder, None if store is None else store.index)
    if store is None:
        raise DataError(f"{dataset.id}: {dataset.address} is read by `simpletuner train` only")
    try:
        if dataset.hub is not None:
            return _hub_source(dataset, store, emit)
        if dataset.table is not None:
            return _table_source(dataset, dataset.table, store)
        assert dataset.store is not None
        files = _store_folder(dataset.store, store, emit)
    except TransferError as error:
        raise DataError(f"{dataset.id}: {dataset.address}: {error.strerror}") from error
    return TarFiles(files, store.index) if dataset.type == "webdataset" else files


def caption_table_file(
    table: CaptionTable, dataset: DatasetConfig, store: RemoteStore | None
) -> SourceFile:
    """Return the file of a table of captions. Raises DataError."""
    if not table.url or store is None:
        return LocalFile(table.path)
    try:
        return open_table(table.url, store, dataset.store)
    except TransferError as error:
        raise DataError(f"{dataset.id}: {table.url}: {error.strerror}") from error


def open_table(location: str, store: RemoteStore, access: StoreLocation | None) -> SourceFile:
    """Return a table by its path or URL. access: how its object store is reached."""
    if "://" not in location:
        return LocalFile(Path(location))
    scheme, _, key = location.partition("://")
    if scheme in WEB_SCHEMES:
        return RemoteFile(location, location, HttpTransport(), store, max_bytes=MAX_TABLE_BYTES)
    if access is None or access.scheme != scheme:
        access = StoreLocation(scheme, key)
    transport = ObjectTransport(replace(access, root=key))
    size = store.retry(location, lambda: transport.file_size(location))
    return RemoteFile(location, location, transport, store, (size, 0, 0), max_bytes=MAX_TABLE_BYTES)


def _store_folder(location: StoreLocation, store: RemoteStore, emit: Emit) -> DatasetSource:
    if location.scheme in WEB_SCHEMES:
        return WebFiles(location, store)
    transport = ObjectTransport(location)
    return RemoteFolder(
        address=location.address,
        identity=f"{location.endpoint_url} {location.address}",
        transport=transport,
        store=store,
        locate=lambda path: f"{location.address}/{path}",
        lister=transport.lister,
        emit=emit,
    )


class WebFiles(DatasetSource):
    """Files behind URLs that are numbered: https://host/shard-{0000..0127}.tar."""

    def __init__(self, location: StoreLocation, store: RemoteStore) -> None:
        self._location, self._store = location, store
        self._transport = HttpTransport()

    def folders(self) -> Iterator[SourceFolder]:
        files: dict[str, SourceFile] = {}
        for url in expand_shards(self._location.address):
            file = RemoteFile(url, url, self._transport, self._store, max_bytes=MAX_TABLE_BYTES)
            files[file.name] = file
        yield SourceFolder("", files)


def expand_shards(pattern: str) -> list[str]:
    """Return the addresses that {first..last} stands for, in order. Raises DataError."""
    range_match = SHARD_RANGE.search(pattern)
    if range_match is None:
        return [pattern]
    first, last = int(range_match.group(1)), int(range_match.group(2))
    if not 0 <= last - first < MAX_SHARDS:
        raise DataError(f"{pattern}: {{first..last}} must be a range of up to {MAX_SHARDS} numbers")
    width = len(range_match.group(1))
    before, after = pattern[: range_match.start()], pattern[range_match.end() :]
    return [
        address
        for number in range(first, last + 1)
        for address in expand_shards(f"{before}{number:0{width}d}{after}")
    ]


def _hub_source(
    dataset: DatasetConfig, store: RemoteStore, emit: Emit
) -> DatasetSource | RowSource:
    assert dataset.hub is not None
    hub_files = find_hub_files(dataset.hub, store, emit)
    if hub_files.kind == "tars":
        return TarFiles(hub_files.folder, store.index)
    if hub_files.kind == "images":
        return hub_files.folder
    listed = {file.path: file for file in hub_files.folder.list_files()}

    def open_path(table: str, path: str) -> tuple[str, SourceFile]:
        inside = os.path.normpath(os.path.join(os.path.dirname(table), path))
        if inside not in listed:
            raise ValueError(f"the repository has no file {inside}")
        return inside, hub_files.folder.file(listed[inside])

    table = dataset.table or ImageTable("", "parquet")
    return TableSource(table, hub_files.tables, _url_opener(store), open_path)


def _table_source(dataset: DatasetConfig, table: ImageTable, store: RemoteStore) -> TableSource:
    folder = dataset.instance_data_dir

    def open_path(_: str, path: str) -> tuple[str, SourceFile]:
        inside = os.path.relpath(os.path.normpath(folder / path), folder)
        if inside.startswith(".."):
            raise ValueError(f"its path is outside of {folder}")
        return unicodedata.normalize("NFC", inside.replace(os.sep, "/")), LocalFile(folder / inside)

    file = open_table(table.location, store, dataset.store)
    return TableSource(table, [("", file, table.format)], _url_opener(store), open_path)


def _url_opener(store: RemoteStore) -> Callable[[str], SourceFile]:
    transport = HttpTransport()
    return lambda url: RemoteFile(url, url, transport, store)
