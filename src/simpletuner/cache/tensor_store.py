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
length: the rows are deleted and the shard is renamed to `*.damaged`, so that its keys are missing
and the next run encodes them again. At most the tensors of the open shard are lost. A bit error
inside a shard is found by the checksum when the tensor is read and handled like (3). A lost or
damaged index is rebuilt from the shards' headers. A finished shard is never deleted.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from torch import Tensor

from simpletuner.cache.shards import (
    DamagedShard,
    ShardEntry,
    read_shard_entries,
    read_shard_tensor,
    write_shard,
)
from simpletuner.cache.sqlite_index import SqliteIndex
from simpletuner.errors import CacheError, DiskFull
from simpletuner.events.event_types import Emit, WarningIssued
from simpletuner.events.sinks import null_emit

MAX_OPEN_SHARDS = 32
# Errors of network file systems that do not support locks.
LOCK_UNSUPPORTED_ERRNOS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (name TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
  key TEXT, tensor TEXT, shard TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
  crc32 INTEGER NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL, PRIMARY KEY (key, tensor)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_shard ON entries (shard);
"""


class TensorStore:
    """Stores {name: tensor} by key. get() and missing_keys() may be called from many threads.

    fingerprint: everything except the key that determines the stored tensors; each fingerprint has
    its own subfolder. shard_mib: put() buffers this much before it writes a shard; close() writes
    the rest.
    """

    def __init__(
        self, folder: Path, fingerprint: str, emit: Emit = null_emit, shard_mib: float = 256.0
    ) -> None:
        self.fingerprint = fingerprint
        self.folder = folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        self._emit = emit
        self._shard_bytes = int(shard_mib * 2**20)
        self._lock = threading.RLock()
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._pending_bytes = 0
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
        rebuild_note = "it is rebuilt from the shards' headers"
        self._index = SqliteIndex(self.folder / "index.sqlite", SCHEMA, emit, rebuild_note)
        self._reconcile_index()

    def missing_keys(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that are not cached, without duplicates, in order."""
        wanted = list(dict.fromkeys(keys))
        with self._lock:
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
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        with self._lock:
            self._pending[key] = copies
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
            rows = self._index.query(
                "SELECT shard, tensor, offset, length, crc32, dtype, shape FROM entries WHERE"
                " key = ?",
                (key,),
            )
        if not rows:
            raise KeyError(key)
        try:
            return {row[1]: self._read_entry(row[0], _entry_from_row(key, row[1:])) for row in rows}
        except (DamagedShard, FileNotFoundError) as error:
            shard = rows[0][0]
            self._set_aside(shard, str(error))
            raise CacheError(
                f"cache shard {self.folder / shard} is damaged: {error}. It was renamed to"
                " *.damaged; run the same command again to encode its entries again."
            ) from error
        except OSError as error:
            raise CacheError(f"cannot read {self.folder / rows[0][0]}: {error}") from error

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
            self._index_shard(path)
            self._pending = {}
            self._pending_bytes = 0

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
        """Make the index match the folder, comparing lengths only: one stat per shard."""
        indexed: dict[str, int] = dict(self._index.query("SELECT name, bytes FROM shards"))
        present = {
            path.name: path.stat().st_size
            for path in sorted(self.folder.glob("shard-*.safetensors"))
        }
        for name, size in indexed.items():
            if present.get(name) != size:
                reason = (
                    f"it has {present[name]} bytes instead of {size}"
                    if name in present
                    else "it is missing"
                )
                self._set_aside(name, reason)
        for name in present.keys() - indexed.keys():
            try:
                self._index_shard(self.folder / name)
            except DamagedShard as error:
                self._set_aside(name, str(error))

    def _index_shard(self, path: Path) -> None:
        rows = []
        for entry in read_shard_entries(path):
            key, _, tensor = entry.name.partition("/")
            shape = ",".join(map(str, entry.shape))
            rows.append(
                (
                    key,
                    tensor,
                    path.name,
                    entry.offset,
                    entry.length,
                    entry.crc32,
                    entry.dtype,
                    shape,
                )
            )
        with self._index.transaction() as index:
            index.executemany("INSERT OR REPLACE INTO entries VALUES (?,?,?,?,?,?,?,?)", rows)
            shard = (path.name, path.stat().st_size)
            index.execute("INSERT OR REPLACE INTO shards VALUES (?,?)", shard)

    def _set_aside(self, shard: str, reason: str) -> None:
        path = self.folder / shard
        with self._lock, self._index.transaction() as index:
            self._files.pop(shard, None)
            if on_disk := path.exists():
                path.replace(path.with_name(f"{shard}.damaged"))
            cursor = index.execute(
                "SELECT COUNT(DISTINCT key) FROM entries WHERE shard = ?", (shard,)
            )
            count = cursor.fetchone()[0]
            index.execute("DELETE FROM entries WHERE shard = ?", (shard,))
            indexed = index.execute("DELETE FROM shards WHERE name = ?", (shard,)).rowcount
        if indexed or on_disk:  # otherwise another thread has already renamed it
            self._emit(
                WarningIssued(
                    f"cache shard {path} is damaged: {reason}; entries that will be encoded again:"
                    f" {count}"
                )
            )

    def _next_shard_number(self) -> int:
        last = self._index.query("SELECT MAX(name) FROM shards")[0][0]
        return int(last.split("-")[1]) + 1 if last else 0


def _entry_from_row(key: str, row: tuple[str, int, int, int, str, str]) -> ShardEntry:
    tensor, offset, length, crc32, dtype, shape = row
    dimensions = tuple(int(size) for size in shape.split(",")) if shape else ()
    return ShardEntry(f"{key}/{tensor}", offset, length, crc32, dtype, dimensions)
