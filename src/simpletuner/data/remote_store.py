"""Remote files on this machine: downloaded once, repeated after failures, bounded on disk.

A file is downloaded completely before it is read. The copies are in the cache folder; the oldest
are deleted when they are together larger than the limit, and downloaded again if they are needed.
So no image of a remote dataset has to fit into memory, and none is downloaded twice as long as the
dataset fits under the limit.

A file that cannot be downloaded is an error for that file only. Which files failed is remembered
once a start got through, so that a later start trains on the same images in the same order; delete
the index (sources.sqlite) to try them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from simpletuner.config.schema import CacheOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.file_facts import FileFactsIndex
from simpletuner.data.rejections import make_printable
from simpletuner.data.sources import SourceFile
from simpletuner.data.transports import (
    ATTEMPTS,
    PartialDownload,
    Result,
    TransferError,
    repeat_request,
)
from simpletuner.errors import DISK_FULL_ERRNOS, storage_error
from simpletuner.events.event_types import Emit, NoticeIssued

FIRST_WAIT_S = 1.0
MAX_NOTICES = 10
GIB = 1 << 30
# A file above this part of the limit is read in parts: it would push out all others.
LARGEST_PART = 4


class RemoteStore:
    """Downloaded copies, and what is remembered of slow files. May be used from many threads.

    folder: of the cache; created. max_bytes: of the copies. pause: waits for a number of seconds.
    """

    def __init__(
        self,
        folder: Path,
        emit: Emit,
        max_bytes: int = 20 * GIB,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder = folder
        self._emit = emit
        self._pause = pause
        self.max_bytes = max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(f"{folder} cannot be created", error) from error
        self.index = FileFactsIndex(folder, emit)
        self._lock = threading.Lock()
        self._copies: OrderedDict[str, int] | None = None
        self._total_bytes = 0
        self._failures: dict[SourceFile, str] = {}
        self.repeated_requests = 0

    def __enter__(self) -> RemoteStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.index.close()

    def may_hold(self, size_bytes: int) -> bool:
        """Return whether a file of this size is worth a copy."""
        return size_bytes <= self.max_bytes // LARGEST_PART

    def open_copy(self, file: SourceFile) -> BinaryIO | None:
        """Open the copy of a file; None when there is none."""
        try:
            return self._path(_copy_name(file)).open("rb")
        except FileNotFoundError:
            return None

    def open(
        self, file: SourceFile, download: Callable[[PartialDownload], None], max_bytes: int
    ) -> BinaryIO:
        """Open the copy of a file, which is downloaded first where there is none.

        Raises TransferError after the last attempt, and at once for a file that could not be
        downloaded in an earlier start. DiskFull or StorageError when the copy cannot be written.
        """
        stream = self.open_copy(file)
        if stream is not None:
            return stream
        self._raise_known_failure(file)
        name = _copy_name(file)
        path = self._path(name)
        # A name of its own: threads and processes may download the same file at once.
        temporary = path.with_name(f"{name}.{os.getpid()}-{uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w+b") as target:
                partial = PartialDownload(target, max_bytes)
                self._attempt(file, lambda: download(partial))
                target.flush()
                # Otherwise a power cut may leave a complete name with a hole in its content.
                os.fsync(target.fileno())
                size = target.tell()
            os.replace(temporary, path)
        except TransferError:
            raise
        except OSError as error:
            if error.errno in DISK_FULL_ERRNOS:
                raise storage_error(f"{path} cannot be written", error) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        stream = path.open("rb")
        self._add_copy(name, size)
        return stream

    def request(self, file: SourceFile, action: Callable[[], Result]) -> Result:
        """Return the result of a request for a part of a file, repeated after failures."""
        self._raise_known_failure(file)
        return self._attempt(file, action)

    def retry(self, action_name: str, action: Callable[[], Result]) -> Result:
        """Return the result of the action, which is repeated after failures that may pass.

        action_name: for the notices. Raises the TransferError of the last attempt.
        """

        def wait(error: TransferError, number: int) -> None:
            wait_s = error.retry_after_s or FIRST_WAIT_S * 2 ** (number - 1)
            self._report_repetition(action_name, error, wait_s, number)
            self._pause(wait_s)

        return repeat_request(action, wait)

    def keep_failures(self) -> None:
        """Remember for later starts which files could not be downloaded."""
        with self._lock:
            failures, self._failures = self._failures, {}
        self.index.remember_failures(failures)

    def _attempt(self, file: SourceFile, action: Callable[[], Result]) -> Result:
        try:
            return self.retry(file.address, action)
        except TransferError as error:
            with self._lock:
                self._failures[file] = str(error.strerror)
            raise

    def _raise_known_failure(self, file: SourceFile) -> None:
        with self._lock:
            known = self._failures.get(file)
        # So that a later start trains on the same images, although the server answers again.
        known = known or self.index.find_failure(file)
        if known:
            raise TransferError(known, permanent=True)

    def _report_repetition(
        self, action_name: str, error: TransferError, wait_s: float, number: int
    ) -> None:
        with self._lock:
            self.repeated_requests += 1
            count = self.repeated_requests
        if count > MAX_NOTICES:
            return
        more = "; further repetitions are not listed" if count == MAX_NOTICES else ""
        attempt = f"attempt {number + 1} of {ATTEMPTS} in {wait_s:g} s{more}"
        text = f"{action_name}: {error.strerror}; {attempt}"
        self._emit(NoticeIssued(make_printable(text)))

    def _path(self, name: str) -> Path:
        return self._folder / "files" / name[:2] / name

    def _add_copy(self, name: str, size: int) -> None:
        """Count a copy, and delete the oldest ones above the limit."""
        with self._lock:
            if self._copies is None:
                self._copies = OrderedDict(self._find_copies())
                self._total_bytes = sum(self._copies.values())
            self._total_bytes += size - self._copies.pop(name, 0)
            self._copies[name] = size
            # At least the newest stays, because its reader may not have opened it yet.
            while self._total_bytes > self.max_bytes and len(self._copies) > 1:
                oldest, freed = self._copies.popitem(last=False)
                self._total_bytes -= freed
                with contextlib.suppress(OSError):  # another process has deleted it
                    self._path(oldest).unlink()

    def _find_copies(self) -> Iterator[tuple[str, int]]:
        """Yield name and size of the copies of earlier starts, the oldest first."""
        copies = []
        for folder in (self._folder / "files").glob("??"):
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        if entry.name.endswith(".tmp"):
                            continue
                        copies.append((status.st_mtime_ns, entry.name, status.st_size))
        for _, name, size in sorted(copies):
            yield name, size


def open_remote_store(
    datasets: Sequence[DatasetConfig],
    options: CacheOptions,
    cache: Path,
    emit: Emit,
    closing: ExitStack,
) -> RemoteStore | None:
    """Return the store of copies in the cache folder; None where every image is a local file.

    closing: receives the store.
    """
    sources = [*datasets, *(dataset.masks for dataset in datasets if dataset.masks is not None)]
    if all(source.has_folder and source.type != "webdataset" for source in sources):
        return None
    limit = int(options.remote_cache_gib * GIB)
    return closing.enter_context(RemoteStore(cache / "sources", emit, limit))


def _copy_name(file: SourceFile) -> str:
    return hashlib.sha256(f"{file.cache_key}|{file.stamp()}".encode()).hexdigest()
