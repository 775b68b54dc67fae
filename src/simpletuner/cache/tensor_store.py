"""A store for encoded tensors: content-derived keys, shards on disk, and an index to find them.

    <folder>/<16 hex digits of the fingerprint>/
        shard-00000-3f9a2c.safetensors    about cache_shard_mib each, never changed once named
        index.sqlite                      key -> shard, offset, length, checksum
        in-use.lock                       locked shared by every process that uses the folder

Crash safety. The shards are the data and the index is derived from them, so the order of writes is
always shard first, index second. A shard is written as `*.tmp`, synced, and renamed to its final
name; only then are its rows committed to the index, in one transaction. A crash at any moment
leaves one of three states, and opening the store repairs each. (1) A `*.tmp` file: its content was
never referenced, and it is deleted, but only by a process that holds `in-use.lock` alone, since
another process may be writing it right now. (2) A named shard without rows in the index: its header
lists its tensors, and it is added to the index. (3) Rows whose shard is missing or has another
length: the shard is verified, and if it is damaged its rows are deleted and it is renamed to
`*.damaged`, so that its keys are missing and the next run encodes them again. At most the tensors
of the open shard are lost.

Damage. A shard that was changed since it was indexed (another length or change time, as after a
copy) is read once and compared with its checksums. A bit error that leaves no such trace is found
by the checksum when the tensor is read. Every row of the index has a checksum of its own; a
damaged row, or a damaged database, makes the index be rebuilt from the shards at once. A finished
shard is never deleted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from simpletuner.cache.shards import (
    SHARD_GLOB,
    DamagedShard,
    ShardEntry,
    read_shard_entries,
    read_shard_tensor,
    shard_folder_name,
    verify_shard,
    write_shard,
)
from simpletuner.data.sqlite_index import SqliteIndex, row_checksum
from simpletuner.errors import CacheError, DiskFull
from simpletuner.events.event_types import Emit, WarningIssued
from simpletuner.events.sinks import null_emit

if TYPE_CHECKING:
    from simpletuner.cache.remote_shards import RemoteShards

MAX_OPEN_SHARDS = 32
IN_MEMORY = Path(":memory:")  # SQLite's name for a database without a file
# Errors of network file systems that do not support locks.
LOCK_UNSUPPORTED_ERRNOS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (
  name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
  checksum INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
  key TEXT, tensor TEXT, shard TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
  crc32 INTEGER NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL, checksum INTEGER NOT NULL,
  PRIMARY KEY (key, tensor)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_shard ON entries (shard);
"""
SCHEMA_VERSION = 2


class DamagedIndex(Exception):
    """A row of the index that differs from what was written; the text says which."""


class TensorStore:
    """Stores {name: tensor} by key. get() and missing_keys() may be called from many threads.

    fingerprint: everything except the key that determines the stored tensors; each fingerprint has
    its own subfolder. shard_mib: put() buffers this much before it writes a shard; close() writes
    the rest. shares_index: False for one of several processes that train together: its index is in
    memory and is read from the shards' headers alone, so that a file system without reliable locks,
    such as NFS, needs only one process that writes index.sqlite. remote: copies of the shards; what
    they have is fetched instead of missing, by the process that shares its index.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        emit: Emit = null_emit,
        shard_mib: float = 256.0,
        *,
        shares_index: bool = True,
        remote: RemoteShards | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.folder = folder / shard_folder_name(fingerprint)
        self._emit = emit
        self._remote = remote
        self._shares_index = shares_index
        self._shard_bytes = int(shard_mib * 2**20)
        self._lock = threading.RLock()
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._pending_bytes = 0
        self.put_count = 0  # entries that this process has added
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Held shared as long as the store is open: it protects unfinished files from being
            # deleted by another process that opens the store.
            self._in_use_lock = (self.folder / "in-use.lock").open("wb")
            self._remove_unfinished()
        except OSError as error:
            raise CacheError(
                f"the cache folder {self.folder} is not writable ({error.strerror}); set cache_dir"
                " to a writable folder"
            ) from error
        # The process that shares its index has compared the shards with their checksums.
        self._read_shard = verify_shard if shares_index else read_shard_entries
        self._index = SqliteIndex(
            self.folder / "index.sqlite" if shares_index else IN_MEMORY,
            SCHEMA,
            SCHEMA_VERSION,
            emit,
            "it is rebuilt from the shards",
            self._reconcile_index,
        )
        try:
            self._reconcile_index()
        except DamagedIndex as error:
            self._index.replace_damaged(str(error))
        if remote is not None and shares_index:
            remote.publish(sorted(self.folder.glob(SHARD_GLOB)))

    def adopt_new_shards(self) -> None:
        """Add the shards to the index that other processes have written since it was opened."""
        with self._lock:
            self._reconcile_index()

    def missing_keys(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that are not cached, without duplicates, in order."""
        absent = self._absent_keys(keys)
        if not absent or self._remote is None or not self._shares_index:
            return absent
        if self._remote.fetch(self.folder, set(absent)):
            self.adopt_new_shards()
        return self._absent_keys(absent)

    def _absent_keys(self, keys: Iterable[str]) -> list[str]:
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            # Tensors of the open shard are not in the index yet.
            present = set(self._pending)
            for start in range(0, len(wanted), 500):  # SQLite allows 999 variables by default
                part = wanted[start : start + 500]
                marks = ",".join("?" * len(part))
                rows = self._index.query(
                    f"SELECT DISTINCT key FROM entries WHERE key IN ({marks})", part
                )
                present.update(row[0] for row in rows)
        return [key for key in wanted if key not in present]

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Buffer tensors; flush() writes them to disk, also whenever a shard is full."""
        # Copies, because a slice of a batch would hold the whole batch in memory.
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        with self._lock:
            self._pending[key] = copies
            self.put_count += 1
            self._pending_bytes += sum(tensor.nbytes for tensor in copies.values())
            if self._pending_bytes >= self._shard_bytes:
                self.flush()

    def get(self, key: str) -> dict[str, Tensor]:
        """Return the tensors of a key, verified by their checksums.

        Raises KeyError when the key is not cached, and CacheError when it is damaged: its shard is
        then renamed to `*.damaged`, and running the same command again encodes its entries.
        """
        with self._lock:
            if key in self._pending:
                return dict(self._pending[key])
            rows = self._entry_rows(key)
        if not rows and self._remote is not None:  # another process may have fetched it
            self.adopt_new_shards()
            rows = self._entry_rows(key)
        if not rows:
            raise KeyError(key)
        try:
            return {row[0]: self._read_entry(row[1], _entry_from_row(key, row)) for row in rows}
        except DamagedIndex as error:
            self._index.replace_damaged(str(error))
            if not self._entry_rows(key):
                raise CacheError(
                    f"{self.folder} no longer has the entry {key}; run the same command again to"
                    " encode it again"
                ) from error
            return self.get(key)
        except (DamagedShard, FileNotFoundError) as error:
            shard = rows[0][1]
            self._set_aside(shard, str(error))
            raise CacheError(
                f"cache shard {self.folder / shard} is damaged: {error}. It was renamed to"
                " *.damaged; run the same command again to encode its entries again."
            ) from error
        except OSError as error:
            raise CacheError(f"cannot read {self.folder / rows[0][1]}: {error}") from error

    def _entry_rows(self, key: str) -> list[Any]:
        return self._index.query(
            "SELECT tensor, shard, offset, length, crc32, dtype, shape, checksum FROM entries"
            " WHERE key = ?",
            (key,),
        )

    def flush(self) -> None:
        """Write the buffered tensors as one shard. Raises DiskFull or CacheError."""
        with self._lock:
            if not self._pending:
                return
            tensors = {
                f"{key}/{name}": tensor
                for key, tensors_of_key in self._pending.items()
                for name, tensor in tensors_of_key.items()
            }
            path = (
                self.folder
                / f"shard-{self._next_shard_number():05d}-{os.urandom(3).hex()}.safetensors"
            )
            try:
                write_shard(path, tensors, self.fingerprint)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DiskFull(
                        f"no disk space left for {self._pending_bytes / 2**20:.0f} MiB of cache in"
                        f" {self.folder}; free some, or set cache_dir to another disk"
                    ) from error
                raise CacheError(f"cannot write {path}: {error}") from error
            self._index_shard(path, read_shard_entries(path))
            self._pending = {}
            self._pending_bytes = 0
            if self._remote is not None:
                self._remote.publish([path])

    @contextmanager
    def flush_on_exit(self) -> Iterator[None]:
        """Write the buffered tensors when the block ends, also after an exception."""
        try:
            yield
        finally:
            self.flush()

    def close(self) -> None:
        """Write the open shard and close all files."""
        with self._lock:
            try:
                self.flush()
            finally:
                self._index.close()
                self._files.clear()
                self._in_use_lock.close()

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_entry(self, shard: str, entry: ShardEntry) -> Tensor:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = FileIO(self.folder / shard)
            self._files.move_to_end(shard)
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)  # closed once its last reader has finished
        return read_shard_tensor(file.fileno(), entry)

    def _remove_unfinished(self) -> None:
        """Delete unfinished files unless another process uses the folder; then lock it shared."""
        try:
            fcntl.flock(self._in_use_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self.folder.glob("*.tmp"):
                path.unlink()
        except BlockingIOError:
            pass  # another process is writing to this store
        except OSError as error:
            if error.errno not in LOCK_UNSUPPORTED_ERRNOS:
                raise
            return  # without locks, unfinished files may belong to another process
        fcntl.flock(self._in_use_lock, fcntl.LOCK_SH)

    def _reconcile_index(self) -> None:
        """Make the index match the folder, comparing lengths and change times: a stat per shard.

        Raises DamagedIndex.
        """
        indexed: dict[str, tuple[int, int]] = {}
        for name, size, changed, checksum in self._index.query("SELECT * FROM shards"):
            if checksum != row_checksum(name, size, changed):
                raise DamagedIndex(f"the row of {name!r} is wrong")
            indexed[name] = (size, changed)
        present = {path.name: _shard_stamp(path) for path in sorted(self.folder.glob(SHARD_GLOB))}
        for name in indexed.keys() - present.keys():
            self._set_aside(name, "it is missing")
        for name, stamp in present.items():
            if indexed.get(name) != stamp:
                try:
                    self._index_shard(self.folder / name, self._read_shard(self.folder / name))
                except DamagedShard as error:
                    self._set_aside(name, str(error))
                except OSError as error:
                    raise CacheError(f"cannot read {self.folder / name}: {error}") from error

    def _index_shard(self, path: Path, entries: Sequence[ShardEntry]) -> None:
        rows = []
        for entry in entries:
            key, _, tensor = entry.name.partition("/")
            shape = ",".join(map(str, entry.shape))
            row = (
                key,
                tensor,
                path.name,
                entry.offset,
                entry.length,
                entry.crc32,
                entry.dtype,
                shape,
            )
            rows.append((*row, row_checksum(*row)))
        shard = (path.name, *_shard_stamp(path))

        def write(index: sqlite3.Connection) -> None:
            index.execute("DELETE FROM entries WHERE shard = ?", (path.name,))
            index.executemany("INSERT OR REPLACE INTO entries VALUES (?,?,?,?,?,?,?,?,?)", rows)
            values = (*shard, row_checksum(*shard))
            index.execute("INSERT OR REPLACE INTO shards VALUES (?,?,?,?)", values)

        self._index.transaction(write)

    def _set_aside(self, shard: str, reason: str) -> None:
        path = self.folder / shard

        def forget(index: sqlite3.Connection) -> tuple[int, int]:
            cursor = index.execute(
                "SELECT COUNT(DISTINCT key) FROM entries WHERE shard = ?", (shard,)
            )
            count = int(cursor.fetchone()[0])
            index.execute("DELETE FROM entries WHERE shard = ?", (shard,))
            return count, index.execute("DELETE FROM shards WHERE name = ?", (shard,)).rowcount

        with self._lock:
            self._files.pop(shard, None)
            if on_disk := path.exists():
                path.replace(path.with_name(f"{shard}.damaged"))
            count, indexed = self._index.transaction(forget)
        if indexed or on_disk:  # otherwise another thread has already renamed it
            self._emit(
                WarningIssued(
                    f"cache shard {path} is damaged: {reason}; entries that will be encoded again:"
                    f" {count}"
                )
            )

    def _next_shard_number(self) -> int:
        last = self._index.query("SELECT MAX(name) FROM shards")[0][0]
        number = str(last).split("-")[1:2]
        return int(number[0]) + 1 if number and number[0].isdecimal() else 0


def _shard_stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_ctime_ns


def _entry_from_row(key: str, row: Sequence[Any]) -> ShardEntry:
    tensor, shard, offset, length, crc32, dtype, shape, checksum = row
    if checksum != row_checksum(key, tensor, shard, offset, length, crc32, dtype, shape):
        raise DamagedIndex(f"a row of the key {key} is wrong")
    dimensions = tuple(int(size) for size in shape.split(",")) if shape else ()
    return ShardEntry(f"{key}/{tensor}", offset, length, crc32, dtype, dimensions)
