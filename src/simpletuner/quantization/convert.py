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

from simpletuner.durable import sync
from simpletuner.errors import CacheError, DiskFull, ModelError
from simpletuner.events.progress import Stage
from simpletuner.events.types import Emit, Noted
from simpletuner.quantization.schemes import Scheme, named

MIB = 2**20
CHUNK_WEIGHTS = 2 * MIB  # the arithmetic takes about 20 bytes for each
SYNC_BYTES = 32 * MIB  # a kill costs at most so much work again
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SPELLED = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file. dtype: once read. offset: of its first byte in the file.

    decode: for what is stored otherwise: bytes (uint8) of whole rows -> the rows in dtype, in any shape.
    decoded_bytes: what one such row takes in the file. A row is what the last dimension counts.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    decode: Callable[[Tensor], Tensor] | None = None
    decoded_bytes: int = 0

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.decoded_bytes if self.decode else self.columns * self.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        """In the file."""
        return self.rows * self.row_bytes

    def cut(self, kept: slice) -> Stored:
        """So many entries of the first dimension; they lie together."""
        count = kept.stop - kept.start
        each = self.size_bytes // max(1, self.shape[0])
        row = count * self.decoded_bytes // self.shape[0] if len(self.shape) == 1 else self.decoded_bytes
        return replace(
            self,
            shape=(count, *self.shape[1:]),
            offset=self.offset + kept.start * each,
            decoded_bytes=row,
        )

    def read(self, file: BinaryIO, first: int, count: int) -> Tensor:
        """(count, columns), in memory of its own."""
        raw = torch.empty(count * self.row_bytes, dtype=torch.uint8, device="cpu")
        file.seek(self.offset + first * self.row_bytes)
        if file.readinto(raw.numpy()) != len(raw):  # type: ignore[attr-defined]
            raise ModelError(f"{self.file} has become shorter while it was read.")
        values = raw.view(self.dtype) if self.decode is None else self.decode(raw)
        return values.view(count, self.columns)

    def whole(self) -> Tensor:
        with self.file.open("rb") as file:
            return self.read(file, 0, self.rows).view(self.shape)


def part_name(weight: str, part: str) -> str:
    """ "proj.weight", "codes" -> "proj.codes", as QuantizedLinear names its buffers."""
    return f"{weight.removesuffix('.weight')}.{part}"


def scheme_file(folder: Path, what: str, scheme: str, fingerprint: str) -> Path:
    """What the converted file is called: by its content, its scheme and what that scheme stores."""
    return folder / f"{what}-{scheme}-{named(scheme).version}-{fingerprint[:16]}.safetensors"


def convert(
    source: Mapping[str, Stored],
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
    placed, header, total = _layout(source, names, scheme, target)
    with _opened(target.with_name(f"{target.name}.partial")) as file:
        _alone(file, target, emit)
        if target.exists():
            return
        done = _finished_tensors(file, header, total)
        _room(file, target, total)
        order = sorted(source, key=lambda name: (str(source[name].file), source[name].offset))
        if done:
            emit(Noted(f"{target.name}: goes on after {done} of {len(order)} tensors"))
        else:
            _write(file, 0, header)
            _count(file, total, 0)
        remaining = sum(source[name].size_bytes for name in order[done:])
        with Stage(emit, f"quantise to {scheme.name}", remaining // MIB, "MiB") as stage:
            read = unsafe = 0
            for number, name in enumerate(order[done:], done + 1):
                chosen = scheme if name in names else None
                for position, content in _pieces(name, source[name], placed, chosen, device):
                    _write(file, position, content)
                read, unsafe = read + source[name].size_bytes, unsafe + source[name].size_bytes
                if unsafe >= SYNC_BYTES:
                    _count(file, total, number)
                    unsafe = 0
                stage.advance(read // MIB - stage.done)
        file.truncate(total)
        _sync(file)
        os.replace(file.name, target)
    sync(target.parent)


def _layout(
    source: Mapping[str, Stored], names: Collection[str], scheme: Scheme, target: Path
) -> tuple[dict[str, Stored], bytes, int]:
    """Every tensor of the result with its place; the header's bytes; the size of the whole file."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, stored in source.items():
        if name in names:
            for part, described in scheme.part_shapes(*stored.shape).items():
                shapes[part_name(name, part)] = described
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
        entries[name] = {"dtype": SPELLED[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed = {name: Stored(target, *shapes[name], len(header) + starts[name]) for name in order}
    return placed, header, len(header) + at


def _pieces(
    name: str, stored: Stored, placed: Mapping[str, Stored], scheme: Scheme | None, device: torch.device
) -> Iterator[tuple[int, bytes | memoryview]]:
    """(place in the result, bytes) of one tensor; scheme: None copies it."""
    with stored.file.open("rb") as file:
        if scheme is None and stored.decode is None:
            file.seek(stored.offset)
            for start in range(0, stored.size_bytes, SYNC_BYTES):
                content = file.read(min(SYNC_BYTES, stored.size_bytes - start))
                yield placed[name].offset + start, content
            return
        rows, columns = stored.rows, stored.columns
        at_once = max(1, CHUNK_WEIGHTS // max(1, columns))
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            weight = stored.read(file, first, count)
            if scheme is None:
                yield placed[name].offset + first * columns * stored.dtype.itemsize, _bytes_of(weight)
                continue
            one, two = scheme.part_shapes(1, columns), scheme.part_shapes(2, columns)
            for part, tensor in scheme.quantize(weight.to(device)).items():
                each = tensor.nbytes // count if one[part] != two[part] else 0  # 0: the same for all rows
                yield placed[part_name(name, part)].offset + first * each, _bytes_of(tensor)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _opened(partial: Path) -> BinaryIO:
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


def _alone(file: BinaryIO, target: Path, emit: Emit) -> None:
    """Until the file is closed nobody else writes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        emit(Noted(f"{target.name}: another process converts it; waiting"))
        fcntl.flock(file, fcntl.LOCK_EX)


def _finished_tensors(file: BinaryIO, header: bytes, total: int) -> int:
    """Of an earlier, killed conversion to exactly this file; 0 when there is none."""
    file.seek(0)
    if os.fstat(file.fileno()).st_size != total + 8 or file.read(len(header)) != header:
        file.truncate(0)
        return 0
    file.seek(total)
    return int(struct.unpack("<Q", file.read(8))[0])


def _room(file: BinaryIO, target: Path, total: int) -> None:
    written = os.fstat(file.fileno()).st_blocks * 512
    free = shutil.disk_usage(target.parent).free
    if total - written > free:
        raise DiskFull(
            f"{target.parent} has room for {free / 1e9:.1f} GB, the quantised weights take"
            f" {(total - written) / 1e9:.1f} GB more. Free some, or set quantized_cache_dir to another disk."
        )


def _write(file: BinaryIO, position: int, content: bytes | memoryview) -> None:
    try:
        file.seek(position)
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise _explained(error, file) from None


def _count(file: BinaryIO, total: int, number: int) -> None:
    """So many tensors are safe: first they, then the number."""
    _sync(file)
    _write(file, total, struct.pack("<Q", number))


def _sync(file: BinaryIO) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise _explained(error, file) from None


def _explained(error: OSError, file: BinaryIO) -> DiskFull | OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"the disk is full at {file.name}; free some, and the same command goes on there")
    return error
