"""Quantize weight files into one safetensors file, a few rows at a time.

18 GB become 5 GB with less than 1 GB of memory. All shapes are known before the first weight is
read, so the header is written first and each result is written directly to its final position.

Crash safety. The output grows under the name `*.partial`, and its last 8 bytes, after the end of
the tensors, hold a counter: how many source tensors are safely on disk. Progress is recorded in two
steps. First fsync makes all tensors written so far durable; then the counter is overwritten. If the
process or the machine stops between the two steps, the counter is too low, and a few tensors are
computed and written again to the same positions, with the same bytes. It is never too high. A
resumed conversion trusts the counter only if the file has the expected size and its header is byte
for byte the header that this conversion would write; otherwise it starts from zero. The order of
the tensors is fixed by source file and offset, so the counter means the same in every process. When
all tensors are written, the file is truncated by the counter, synced and renamed to its final name;
a file with that name is therefore always complete. An exclusive lock on the partial file makes a
second process wait instead of writing to it, and after the wait the process looks for the finished
file again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from simpletuner.atomic_io import fsync_path
from simpletuner.errors import CacheError, DiskFull
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.quantization.schemes import Scheme, get_scheme
from simpletuner.quantization.stored_tensor import DTYPE_NAMES, StoredTensor

MIB = 2**20
WEIGHTS_PER_CHUNK = 2 * MIB  # quantizing takes about 20 bytes of memory per weight
SYNC_INTERVAL_BYTES = 32 * MIB  # the most work that is repeated after a crash


def buffer_name(weight: str, part: str) -> str:
    """Return QuantizedLinear's buffer name: "proj.weight", "codes" -> "proj.codes"."""
    return f"{weight.removesuffix('.weight')}.{part}"


def quantized_file_path(folder: Path, component: str, scheme: str, fingerprint: str) -> Path:
    """Return the converted file's path: named by content, scheme and version of the scheme."""
    return (
        folder / f"{component}-{scheme}-{get_scheme(scheme).version}-{fingerprint[:16]}.safetensors"
    )


def quantize_to_file(
    source: Mapping[str, StoredTensor],
    names: Collection[str],
    scheme: Scheme,
    target: Path,
    device: torch.device,
    emit: Emit,
) -> None:
    """Write `target`: the matrices `names` quantized, all other tensors decoded but unchanged.

    device: where the quantization is computed. Returns at once when the target exists; waits when
    another process is writing it. Raises DiskFull before anything is written.
    """
    if target.exists():
        return
    placed, header, total = _assign_offsets(source, names, scheme, target)
    with _open_partial(target.with_name(f"{target.name}.partial")) as file:
        _lock_exclusively(file, target, emit)
        if target.exists():
            return
        # After the wait for the lock, another process may have finished some of them.
        finished = _count_finished_tensors(file, header, total)
        _check_free_space(file, target, total)
        order = sorted(source, key=lambda name: (str(source[name].file), source[name].offset))
        if finished:
            emit(NoticeIssued(f"{target.name}: resuming after {finished} of {len(order)} tensors"))
        else:
            _write_at(file, 0, header)
            _record_progress(file, total, 0)
        remaining = sum(source[name].size_bytes for name in order[finished:])
        with StageReporter(emit, f"quantize to {scheme.name}", remaining // MIB, "MiB") as stage:
            read_bytes = 0
            unsynced_bytes = 0
            for number, name in enumerate(order[finished:], finished + 1):
                tensor_scheme = scheme if name in names else None
                for position, content in _iter_writes(
                    name, source[name], placed, tensor_scheme, device
                ):
                    _write_at(file, position, content)
                read_bytes += source[name].size_bytes
                unsynced_bytes += source[name].size_bytes
                if unsynced_bytes >= SYNC_INTERVAL_BYTES:
                    _record_progress(file, total, number)
                    unsynced_bytes = 0
                stage.advance(read_bytes // MIB - stage.done)
        file.truncate(total)
        _fsync(file)
        os.replace(file.name, target)
    fsync_path(target.parent)


def _assign_offsets(
    source: Mapping[str, StoredTensor], names: Collection[str], scheme: Scheme, target: Path
) -> tuple[dict[str, StoredTensor], bytes, int]:
    """Return the position of every output tensor, the header's bytes, and the file's size."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, stored in source.items():
        if name in names:
            for buffer, shape_and_dtype in scheme.buffer_shapes(*stored.shape).items():
                shapes[buffer_name(name, buffer)] = shape_and_dtype
        else:
            shapes[name] = (stored.shape, stored.dtype)
    # Largest elements first, so that every tensor is aligned to its element size.
    order = sorted(shapes, key=lambda name: -shapes[name][1].itemsize)
    entries: dict[str, object] = {
        "__metadata__": {"format": "pt", "scheme": f"{scheme.name} {scheme.version}"}
    }
    starts, end = {}, 0
    for name in order:
        shape, dtype = shapes[name]
        starts[name], size = end, torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    # safetensors aligns the data to 8 bytes by spaces in the header.
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed = {
        name: StoredTensor(target, *shapes[name], len(header) + starts[name]) for name in order
    }
    return placed, header, len(header) + end


def _iter_writes(
    name: str,
    stored: StoredTensor,
    placed: Mapping[str, StoredTensor],
    scheme: Scheme | None,
    device: torch.device,
) -> Iterator[tuple[int, bytes | memoryview]]:
    """Yield (position in the output, bytes) of one tensor; scheme None copies it."""
    with stored.file.open("rb") as file:
        if scheme is None and stored.decode is None:
            file.seek(stored.offset)
            for start in range(0, stored.size_bytes, SYNC_INTERVAL_BYTES):
                content = file.read(min(SYNC_INTERVAL_BYTES, stored.size_bytes - start))
                yield placed[name].offset + start, content
            return
        rows, columns = stored.rows, stored.columns
        rows_per_chunk = max(1, WEIGHTS_PER_CHUNK // max(1, columns))
        for first in range(0, rows, rows_per_chunk):
            count = min(rows_per_chunk, rows - first)
            weight = stored.read_rows(file, first, count)
            if scheme is None:
                yield (
                    placed[name].offset + first * columns * stored.dtype.itemsize,
                    _as_bytes(weight),
                )
                continue
            shapes_of_one_row, shapes_of_two_rows = (
                scheme.buffer_shapes(1, columns),
                scheme.buffer_shapes(2, columns),
            )
            for buffer, tensor in scheme.quantize(weight.to(device)).items():
                # A buffer whose shape does not depend on the rows is the same for all of them.
                per_row = shapes_of_one_row[buffer] != shapes_of_two_rows[buffer]
                row_bytes = tensor.nbytes // count if per_row else 0
                yield (
                    placed[buffer_name(name, buffer)].offset + first * row_bytes,
                    _as_bytes(tensor),
                )


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _open_partial(partial: Path) -> BinaryIO:
    """Open the partial file for reading and writing, and create it if needed; never truncate it.

    Unbuffered, because a buffered file would write again, at closing, what a full disk has refused,
    and raise an error without context.
    """
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        return partial.open("r+b", buffering=0)
    except OSError as error:
        raise CacheError(
            f"{partial.parent} is not writable ({error.strerror}); set quantized_cache_dir to a"
            " writable folder"
        ) from None


def _lock_exclusively(file: BinaryIO, target: Path, emit: Emit) -> None:
    """Lock the partial file until it is closed; wait while another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        emit(NoticeIssued(f"{target.name}: another process is converting it; waiting"))
        fcntl.flock(file, fcntl.LOCK_EX)


def _count_finished_tensors(file: BinaryIO, header: bytes, total: int) -> int:
    """Return the counter of an interrupted conversion to exactly this file, else 0."""
    file.seek(0)
    if os.fstat(file.fileno()).st_size != total + 8 or file.read(len(header)) != header:
        file.truncate(0)
        return 0
    file.seek(total)
    return int(struct.unpack("<Q", file.read(8))[0])


def _check_free_space(file: BinaryIO, target: Path, total: int) -> None:
    # A sparse file: its length is the whole size from the start, its blocks are what is written.
    written = os.fstat(file.fileno()).st_blocks * 512
    free = shutil.disk_usage(target.parent).free
    if total - written > free:
        raise DiskFull(
            f"{target.parent} has {free / 1e9:.1f} GB free, but the quantized weights need"
            f" {(total - written) / 1e9:.1f} GB more. Free disk space, or set"
            " quantized_cache_dir to another disk."
        )


def _write_at(file: BinaryIO, position: int, content: bytes | memoryview) -> None:
    try:
        file.seek(position)
        remaining = memoryview(content)
        # A raw file may write a part of what it is given.
        while remaining:
            remaining = remaining[file.write(remaining) :]
    except OSError as error:
        raise _to_disk_full(error, file) from None


def _record_progress(file: BinaryIO, total: int, number: int) -> None:
    """Record that the first `number` tensors are on disk: sync them, then write the counter."""
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
            f"no disk space left for {file.name}; free some and run the same command again to"
            " resume"
        )
    return error
