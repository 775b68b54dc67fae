"""Any weight file to safetensors, a few rows at a time: 18 GB become 5 in less than 1 GB of memory.

Every shape is known before the first weight is read, so the header is written first and each result goes
straight to its place. While a file grows it is called .partial and ends in a number: how many tensors are
safely on disk. A killed conversion goes on there; only a finished one gets its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from simpletuner.atomic_io import fsync_path
from simpletuner.errors import CacheError, DiskFull, ModelError
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.quantization.schemes import Scheme, get_scheme

MIB = 2**20
WEIGHTS_PER_CHUNK = 2 * MIB  # the arithmetic takes about 20 bytes for each
SYNC_INTERVAL_BYTES = 32 * MIB  # a kill costs at most so much work again
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. dtype: once read. offset: of its first byte in the file.

    decode: for what is stored otherwise: bytes (uint8) of whole rows -> the rows in dtype, in any shape.
    decoded_bytes: what one such row takes in the file. A row is what the last dimension counts.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    decode: Callable[[Tensor], Tensor] | None = None
    encoded_row_bytes: int = 0

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.encoded_row_bytes if self.decode else self.columns * self.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        """In the file."""
        return self.rows * self.row_bytes

    def slice_dim0(self, kept: slice) -> StoredTensor:
        """So many entries of the first dimension; they lie together."""
        count = kept.stop - kept.start
        each = self.size_bytes // max(1, self.shape[0])
        row = (
            count * self.encoded_row_bytes // self.shape[0]
            if len(self.shape) == 1
            else self.encoded_row_bytes
        )
        return replace(
            self,
            shape=(count, *self.shape[1:]),
            offset=self.offset + kept.start * each,
            encoded_row_bytes=row,
        )

    def read_rows(self, file: BinaryIO, first: int, count: int) -> Tensor:
        """(count, columns), in memory of its own."""
        raw = torch.empty(count * self.row_bytes, dtype=torch.uint8, device="cpu")
        file.seek(self.offset + first * self.row_bytes)
        if file.readinto(raw.numpy()) != len(raw):  # type: ignore[attr-defined]
            raise ModelError(f"{self.file} has become shorter while it was read.")
        values = raw.view(self.dtype) if self.decode is None else self.decode(raw)
        return values.view(count, self.columns)

    def load(self) -> Tensor:
        with self.file.open("rb") as file:
            return self.read_rows(file, 0, self.rows).view(self.shape)


def buffer_name(weight: str, part: str) -> str:
    """ "proj.weight", "codes" -> "proj.codes", as QuantizedLinear names its buffers."""
    return f"{weight.removesuffix('.weight')}.{part}"


def quantized_file_path(folder: Path, what: str, scheme: str, fingerprint: str) -> Path:
    """What the converted file is called: by its content, its scheme and what that scheme stores."""
    return folder / f"{what}-{scheme}-{get_scheme(scheme).version}-{fingerprint[:16]}.safetensors"


def quantize_to_file(
    source: Mapping[str, StoredTensor],
    names: Collection[str],
    scheme: Scheme,
    target: Path,
    device: torch.device,
    emit: Emit,
) -> None:
    """Write `target`: of the matrices `names` the scheme's parts, everything else as it is once read.

    device: where the arithmetic is done. Returns at once when the target exists; another process at the same
    work is waited for. DiskFull before anything is written.
    """
    if target.exists():
        return
    placed, header, total = _assign_offsets(source, names, scheme, target)
    with _open_partial(target.with_name(f"{target.name}.partial")) as file:
        _lock_exclusively(file, target, emit)
        if target.exists():
            return
        done = _count_finished_tensors(file, header, total)
        _check_free_space(file, target, total)
        order = sorted(source, key=lambda name: (str(source[name].file), source[name].offset))
        if done:
            emit(NoticeIssued(f"{target.name}: goes on after {done} of {len(order)} tensors"))
        else:
            _write_at(file, 0, header)
            _record_progress(file, total, 0)
        remaining = sum(source[name].size_bytes for name in order[done:])
        with StageReporter(emit, f"quantise to {scheme.name}", remaining // MIB, "MiB") as stage:
            read = unsafe = 0
            for number, name in enumerate(order[done:], done + 1):
                chosen = scheme if name in names else None
                for position, content in _iter_writes(name, source[name], placed, chosen, device):
                    _write_at(file, position, content)
                read, unsafe = read + source[name].size_bytes, unsafe + source[name].size_bytes
                if unsafe >= SYNC_INTERVAL_BYTES:
                    _record_progress(file, total, number)
                    unsafe = 0
                stage.advance(read // MIB - stage.done)
        file.truncate(total)
        _fsync(file)
        os.replace(file.name, target)
    fsync_path(target.parent)


def _assign_offsets(
    source: Mapping[str, StoredTensor], names: Collection[str], scheme: Scheme, target: Path
) -> tuple[dict[str, StoredTensor], bytes, int]:
    """Every tensor of the result with its place; the header's bytes; the size of the whole file."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, stored in source.items():
        if name in names:
            for part, described in scheme.buffer_shapes(*stored.shape).items():
                shapes[buffer_name(name, part)] = described
        else:
            shapes[name] = (stored.shape, stored.dtype)
    # Wide numbers first, so that every tensor begins at a multiple of its own width.
    order = sorted(shapes, key=lambda name: -shapes[name][1].itemsize)
    entries: dict[str, object] = {
        "__metadata__": {"format": "pt", "scheme": f"{scheme.name} {scheme.version}"}
    }
    starts, at = {}, 0
    for name in order:
        shape, dtype = shapes[name]
        starts[name], size = at, torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": shape,
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed = {
        name: StoredTensor(target, *shapes[name], len(header) + starts[name]) for name in order
    }
    return placed, header, len(header) + at


def _iter_writes(
    name: str,
    stored: StoredTensor,
    placed: Mapping[str, StoredTensor],
    scheme: Scheme | None,
    device: torch.device,
) -> Iterator[tuple[int, bytes | memoryview]]:
    """(place in the result, bytes) of one tensor; scheme: None copies it."""
    with stored.file.open("rb") as file:
        if scheme is None and stored.decode is None:
            file.seek(stored.offset)
            for start in range(0, stored.size_bytes, SYNC_INTERVAL_BYTES):
                content = file.read(min(SYNC_INTERVAL_BYTES, stored.size_bytes - start))
                yield placed[name].offset + start, content
            return
        rows, columns = stored.rows, stored.columns
        at_once = max(1, WEIGHTS_PER_CHUNK // max(1, columns))
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            weight = stored.read_rows(file, first, count)
            if scheme is None:
                yield (
                    placed[name].offset + first * columns * stored.dtype.itemsize,
                    _as_bytes(weight),
                )
                continue
            one, two = scheme.buffer_shapes(1, columns), scheme.buffer_shapes(2, columns)
            for part, tensor in scheme.quantize(weight.to(device)).items():
                each = (
                    tensor.nbytes // count if one[part] != two[part] else 0
                )  # 0: the same for all rows
                yield placed[buffer_name(name, part)].offset + first * each, _as_bytes(tensor)


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _open_partial(partial: Path) -> BinaryIO:
    """For reading and writing, made when it is not there and never emptied.

    Unbuffered: what a full disk refused would be written once more at closing, and fail without explanation.
    """
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        return partial.open("r+b", buffering=0)
    except OSError as error:
        raise CacheError(
            f"{partial.parent} cannot be written ({error.strerror}); quantized_cache_dir chooses another"
        ) from None


def _lock_exclusively(file: BinaryIO, target: Path, emit: Emit) -> None:
    """Until the file is closed nobody else writes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        emit(NoticeIssued(f"{target.name}: another process converts it; waiting"))
        fcntl.flock(file, fcntl.LOCK_EX)


def _count_finished_tensors(file: BinaryIO, header: bytes, total: int) -> int:
    """Of an earlier, killed conversion to exactly this file; 0 when there is none."""
    file.seek(0)
    if os.fstat(file.fileno()).st_size != total + 8 or file.read(len(header)) != header:
        file.truncate(0)
        return 0
    file.seek(total)
    return int(struct.unpack("<Q", file.read(8))[0])


def _check_free_space(file: BinaryIO, target: Path, total: int) -> None:
    written = os.fstat(file.fileno()).st_blocks * 512
    free = shutil.disk_usage(target.parent).free
    if total - written > free:
        raise DiskFull(
            f"{target.parent} has room for {free / 1e9:.1f} GB, the quantised weights take"
            f" {(total - written) / 1e9:.1f} GB more. Free some, or set quantized_cache_dir to another disk."
        )


def _write_at(file: BinaryIO, position: int, content: bytes | memoryview) -> None:
    try:
        file.seek(position)
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise _to_disk_full(error, file) from None


def _record_progress(file: BinaryIO, total: int, number: int) -> None:
    """So many tensors are safe: first they, then the number."""
    _fsync(file)
    _write_at(file, total, struct.pack("<Q", number))


def _fsync(file: BinaryIO) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise _to_disk_full(error, file) from None


def _to_disk_full(error: OSError, file: BinaryIO) -> DiskFull | OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"the disk is full at {file.name}; free some, and the same command goes on there"
        )
    return error
