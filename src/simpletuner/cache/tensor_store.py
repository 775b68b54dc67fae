"""Encode once: tensors under content-derived keys, in shards, with an index that can always be rebuilt.

    <folder>/<16 hex of the fingerprint>/
        shard-00000-3f9a2c.safetensors    about cache_shard_mib each, never changed once named
        index.sqlite                      key -> shard, offset, length, checksum

A shard is written under a temporary name, synced and renamed; the index learns of it afterwards. A process
killed at any moment loses at most the tensors of the open shard: a shard that the index does not know is
adopted at the next start, and an index that is lost is rebuilt from the shards' headers. What is damaged is
renamed (`*.damaged`), never deleted, and its keys become missing, so that the next fill encodes them again.
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
LOCK_UNSUPPORTED_ERRNOS = (
    errno.ENOLCK,
    errno.ENOTSUP,
    errno.ENOSYS,
)  # of some network file systems
SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (name TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
  key TEXT, tensor TEXT, shard TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
  crc32 INTEGER NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL, PRIMARY KEY (key, tensor)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_shard ON entries (shard);
"""


class TensorStore:
    """put() and get() of {name: Tensor} by key. get() and missing() may be called from many threads.

    fingerprint: everything besides the key that decides what is stored; one sub-folder per fingerprint.
    shard_mib: put() buffers this much before it writes; close() writes the rest.
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
            # Held shared for the life of the store: while others work here, unfinished files may be theirs.
            self._in_use_lock = (self.folder / "in-use.lock").open("wb")
            self._remove_unfinished()
        except OSError as error:
            raise CacheError(
                f"the cache folder {self.folder} cannot be written to ({error.strerror}); "
                "set cache_dir to one that can"
            ) from error
        refill = "rebuilt from the shards' headers"
        self._index = SqliteIndex(self.folder / "index.sqlite", SCHEMA, emit, refill)
        self._reconcile_index()

    def missing_keys(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that get() would not find, once each, in order."""
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            present = set(self._pending)
            for start in range(0, len(wanted), 500):  # SQLite's default limit of variables is 999
                part = wanted[start : start + 500]
                marks = ",".join("?" * len(part))
                rows = self._index.query(
                    f"SELECT DISTINCT key FROM entries WHERE key IN ({marks})", part
                )
                present.update(row[0] for row in rows)
        return [key for key in wanted if key not in present]

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Buffered; on disk after flush(), which happens by itself when a shard is full."""
        kept = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        with self._lock:
            self._pending[key] = kept
            self._pending_bytes += sum(tensor.nbytes for tensor in kept.values())
            if self._pending_bytes >= self._shard_bytes:
                self.flush()

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key, checked against their checksums.

        KeyError: not in this store. CacheError: it was there but damaged; its shard has been set aside, so
        filling the store again (the same command once more) rebuilds it.
        """
        with self._lock:
            if key in self._pending:
                return dict(self._pending[key])
            rows = self._index.query(
                "SELECT shard, tensor, offset, length, crc32, dtype, shape FROM entries WHERE key = ?",
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
                f"cache shard {self.folder / shard} is damaged: {error}. It was set aside; "
                "start the same command again and what it held is encoded anew."
            ) from error
        except OSError as error:
            raise CacheError(f"cannot read {self.folder / rows[0][0]}: {error}") from error

    def flush(self) -> None:
        """Write what put() has buffered as one shard. DiskFull when there is no room."""
        with self._lock:
            if not self._pending:
                return
            tensors = {
                f"{key}/{name}": t for key, of in self._pending.items() for name, t in of.items()
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
                        f"no room for {self._pending_bytes / 2**20:.0f} MiB of cache in {self.folder}"
                    ) from error
                raise CacheError(f"cannot write {path}: {error}") from error
            self._index_shard(path)
            self._pending, self._pending_bytes = {}, 0

    @contextmanager
    def flush_on_exit(self) -> Iterator[None]:
        """Whatever ends the work inside, what was put is on disk afterwards."""
        try:
            yield
        finally:
            self.flush()

    def close(self) -> None:
        """Write the open shard and let go of every file."""
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
                self._files.popitem(last=False)  # closed when the last reader lets go of it
        return read_shard_tensor(file.fileno(), entry)

    def _remove_unfinished(self) -> None:
        try:
            fcntl.flock(self._in_use_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self.folder.glob("*.tmp"):
                path.unlink()
        except BlockingIOError:
            pass  # another process is filling this store
        except OSError as error:
            if error.errno not in LOCK_UNSUPPORTED_ERRNOS:
                raise
            return  # unfinished files stay: they may be another's
        fcntl.flock(self._in_use_lock, fcntl.LOCK_SH)

    def _reconcile_index(self) -> None:
        """Make index and folder agree: by length only, so that a million samples cost one stat per shard."""
        known: dict[str, int] = dict(self._index.query("SELECT name, bytes FROM shards"))
        found = {
            path.name: path.stat().st_size
            for path in sorted(self.folder.glob("shard-*.safetensors"))
        }
        for name, size in known.items():
            if found.get(name) != size:
                what = (
                    f"it is {found[name]} bytes long instead of {size}"
                    if name in found
                    else "it is gone"
                )
                self._set_aside(name, what)
        for name in found.keys() - known.keys():
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
            if exists := path.exists():
                path.replace(path.with_name(f"{shard}.damaged"))
            lost = index.execute(
                "SELECT COUNT(DISTINCT key) FROM entries WHERE shard = ?", (shard,)
            )
            count = lost.fetchone()[0]
            index.execute("DELETE FROM entries WHERE shard = ?", (shard,))
            known = index.execute("DELETE FROM shards WHERE name = ?", (shard,)).rowcount
        if known or exists:  # otherwise another thread was here first
            self._emit(
                WarningIssued(
                    f"cache shard {path} is damaged: {reason}; {count} entries are encoded again"
                )
            )

    def _next_shard_number(self) -> int:
        last = self._index.query("SELECT MAX(name) FROM shards")[0][0]
        return int(last.split("-")[1]) + 1 if last else 0


def _entry_from_row(key: str, row: tuple[str, int, int, int, str, str]) -> ShardEntry:
    tensor, offset, length, crc32, dtype, shape = row
    sides = tuple(int(side) for side in shape.split(",")) if shape else ()
    return ShardEntry(f"{key}/{tensor}", offset, length, crc32, dtype, sides)
