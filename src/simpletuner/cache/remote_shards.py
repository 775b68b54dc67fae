"""Copies of cache shards in an object store, for several machines, or for one that is rented again.

A shard is never changed once it has its name, names are unique, and every shard says which keys it
has. So a copy is a plain upload, and fetching is a download of the shards that have a key that is
missing here; there is no other state in the store, and none that could contradict the shards.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path

from simpletuner.cache.shards import (
    MAX_HEADER_BYTES,
    SHARD_GLOB,
    DamagedShard,
    shard_folder_name,
    verify_shard,
)
from simpletuner.data.address_schemes import split_address
from simpletuner.data.dataset_config import StoreLocation
from simpletuner.data.object_store import ObjectTransport
from simpletuner.data.transports import (
    PartialDownload,
    Result,
    TransferError,
    repeat_request,
)
from simpletuner.errors import CacheError
from simpletuner.events.event_types import Emit, NoticeIssued, WarningIssued

FIRST_WAIT_S = 1.0


class RemoteShards:
    """The shards of one fingerprint in an object store.

    address: of the folder that has a folder for each fingerprint. Raises CacheError when the store
    refuses to be read; one that cannot be reached is not used, with a warning.
    """

    def __init__(self, address: str, fingerprint: str, emit: Emit) -> None:
        scheme, root = split_address(address)
        self._location = StoreLocation(scheme, f"{root}/{shard_folder_name(fingerprint)}")
        self._emit = emit
        self._transport = ObjectTransport(self._location)
        self._is_reachable = True
        self._sizes: dict[str, int] | None = None
        self._keys: dict[str, frozenset[str]] = {}

    def fetch(self, folder: Path, wanted: Collection[str]) -> int:
        """Download the shards that have one of the keys; return how many."""
        fetched = 0
        for name, size in sorted((self._list() or {}).items()):
            if not Path(name).match(SHARD_GLOB) or (folder / name).exists():
                continue
            try:
                if self._keys_of(name, size).isdisjoint(wanted):
                    continue
                fetched += self._download(name, size, folder)
            except TransferError as error:
                self._warn(f"{name} was not fetched: {error.strerror}")
        if fetched:
            self._emit(
                NoticeIssued(f"cache files fetched from {self._location.address}: {fetched}")
            )
        return fetched

    def publish(self, shards: Iterable[Path]) -> None:
        """Upload the shards that the store does not have; a failure is a warning."""
        present = self._list()
        for shard in shards if present is not None else ():
            if shard.name in (present or {}):
                continue
            upload = partial(self._transport.upload, shard, self._address(shard.name))
            try:
                self._repeat(upload)
            except TransferError as error:
                self._warn(
                    f"{shard.name} was not copied: {error.strerror}; the next run tries again"
                )
                return
            self._sizes = {**(self._sizes or {}), shard.name: shard.stat().st_size}

    def _list(self) -> dict[str, int] | None:
        """Return the sizes of the files by name, listed once; None if there was no answer."""
        if self._sizes is not None or not self._is_reachable:
            return self._sizes
        sizes: dict[str, int] = {}
        lister = self._transport.lister()
        try:
            while not lister.is_complete:
                page = self._repeat(lister.next_page)
                sizes |= {file.path: file.size_bytes for file in page.files}
                lister.follow(page)
        except TransferError as error:
            # A folder that is not there yet is an empty cache.
            if error.permanent and not self._transport.is_missing_folder(error):
                raise CacheError(
                    f"cache_remote: {self._location.address}: {error.strerror}"
                ) from error
            if not error.permanent:
                self._is_reachable = False
                self._warn(f"is not used in this run: {error.strerror}")
                return None
        self._sizes = sizes
        return sizes

    def _keys_of(self, name: str, size: int) -> frozenset[str]:
        """Return the keys of the entries in a shard, from its header; none of a damaged one."""
        if name not in self._keys:
            address = self._address(name)
            # A safetensors file begins with the length of its header, in 8 bytes.
            start = self._repeat(lambda: self._transport.read_range(address, 0, min(8, size)))
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            self._keys[name] = frozenset()
            if length <= min(size - 8, MAX_HEADER_BYTES):
                text = self._repeat(lambda: self._transport.read_range(address, 8, length))
                self._keys[name] = _keys_in_header(text)
        return self._keys[name]

    def _download(self, name: str, size: int, folder: Path) -> int:
        """Return 1 after the shard is in the folder under its name, 0 if its copy is damaged."""
        # With the number of the process, because another one may fetch the same shard.
        unfinished = folder / f"{name}.{os.getpid()}.tmp"
        try:
            with unfinished.open("wb") as file:
                copy = PartialDownload(file, size, size)
                self._repeat(lambda: self._transport.download(self._address(name), copy))
                file.flush()
                # It must be on the disk before it has its name.
                os.fsync(file.fileno())
            verify_shard(unfinished)
            unfinished.rename(folder / name)
        except DamagedShard as error:
            self._warn(f"the copy {name} is damaged and not used: {error}")
            return 0
        finally:
            unfinished.unlink(missing_ok=True)
        return 1

    def _address(self, name: str) -> str:
        return f"{self._location.address}/{name}"

    def _warn(self, text: str) -> None:
        self._emit(WarningIssued(f"cache_remote: {self._location.address}: {text}"))

    @staticmethod
    def _repeat(action: Callable[[], Result]) -> Result:
        def wait(error: TransferError, number: int) -> None:
            time.sleep(error.retry_after_s or FIRST_WAIT_S * 2 ** (number - 1))

        return repeat_request(action, wait)


def _keys_in_header(text: bytes) -> frozenset[str]:
    try:
        return frozenset(name.partition("/")[0] for name in json.loads(text))
    except (ValueError, AttributeError, RecursionError, TypeError):
        return frozenset()
