"""Shards: safetensors files whose metadata holds a CRC-32 per tensor.

The file is written here rather than by the safetensors library, for three reasons: it is synced
through the handle that wrote it; a full disk raises an OSError; and the byte range of each tensor
is known, so that tensors can be read by position. A truncated file then causes a short read, where
a memory map would cause SIGBUS. Any safetensors reader can open the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.atomic_io import fsync_path
from simpletuner.errors import CacheError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
SHARD_GLOB = "shard-*.safetensors"  # names of finished shards
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def shard_folder_name(fingerprint: str) -> str:
    """Return the name of the folder of a fingerprint's shards."""
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:16]


class DamagedShard(CacheError):
    """A shard that differs from what was written; the text says how."""


@dataclass(frozen=True)
class ShardEntry:
    """Position of one tensor in a shard.

    name: "<key>/<tensor>". offset, length: in bytes from the start of the file.
    """

    name: str
    offset: int
    length: int
    crc32: int
    dtype: str
    shape: tuple[int, ...]

    def is_consistent(self) -> bool:
        """Return whether the types are right and the shape needs exactly `length` bytes."""
        numbers = (self.offset, self.length, self.crc32, *self.shape)
        if any(type(number) is not int or number < 0 for number in numbers):
            return False
        if not isinstance(self.dtype, str) or self.dtype not in SAFETENSORS_DTYPES:
            return False
        return self.length == math.prod(self.shape) * SAFETENSORS_DTYPES[self.dtype].itemsize


def write_shard(final: Path, tensors: Mapping[str, Tensor], fingerprint: str) -> None:
    """Write a shard that appears under its final name complete and synced, or not at all.

    tensors: "<key>/<tensor>" -> CPU tensor. Raises OSError (disk full, no permission); the
    unfinished file is removed.
    """
    # Largest elements first, so that every tensor is aligned to its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    bytes_by_name = {
        name: tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for name, tensor in ordered
    }
    header: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "fingerprint": fingerprint,
            "crc32": json.dumps({name: zlib.crc32(data) for name, data in bytes_by_name.items()}),
        }
    }
    end = 0
    for name, tensor in ordered:
        start, end = end, end + bytes_by_name[name].nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = final.with_name(f"{final.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for data in bytes_by_name.values():
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(final)
    finally:
        unfinished.unlink(missing_ok=True)
    # The rename itself is durable only when the folder is synced.
    fsync_path(final.parent)


def read_shard_entries(path: Path) -> list[ShardEntry]:
    """Read the index entries from the header; tensors are not read.

    Raises DamagedShard when the header is damaged or does not fit the file's length.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if header_length > min(size - 8, MAX_HEADER_BYTES):
            raise DamagedShard("its header is incomplete")
        text = file.read(header_length)
    base = 8 + header_length
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        crc32 = json.loads(metadata["crc32"])
        entries = [
            ShardEntry(
                name,
                base + fields["data_offsets"][0],
                fields["data_offsets"][1] - fields["data_offsets"][0],
                crc32[name],
                fields["dtype"],
                tuple(fields["shape"]),
            )
            for name, fields in header.items()
        ]
        end = base
        # Without gaps and overlaps, as write_shard leaves it: a wrong offset would read another
        # tensor.
        for entry in sorted(entries, key=lambda entry: (entry.offset, entry.length)):
            if not entry.is_consistent() or entry.offset != end:
                raise DamagedShard(f"its header describes '{entry.name}' wrongly")
            end += entry.length
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
    ) as error:
        raise DamagedShard(f"its header cannot be read ({type(error).__name__})") from error
    if end != size:
        raise DamagedShard(f"it is {size} bytes long, its header says {end}")
    return entries


def verify_shard(path: Path) -> list[ShardEntry]:
    """Return the entries after every tensor was read and its checksum compared.

    Raises DamagedShard, and OSError when the file cannot be read.
    """
    entries = read_shard_entries(path)
    with path.open("rb") as file:
        for entry in entries:
            read_shard_tensor(file.fileno(), entry)
    return entries


def read_shard_tensor(handle: int, entry: ShardEntry) -> Tensor:
    """Read one tensor by position and verify its checksum.

    Thread-safe, because the file position of the handle is not used.
    """
    data = torch.empty(entry.length, dtype=torch.uint8)
    view = data.numpy().data
    read_length = os.preadv(handle, [view], entry.offset) if entry.length else 0
    if read_length != entry.length:
        raise DamagedShard(f"'{entry.name}' ends after {read_length} of {entry.length} bytes")
    if zlib.crc32(view) != entry.crc32:
        raise DamagedShard(f"the checksum of '{entry.name}' is wrong")
    return data.view(SAFETENSORS_DTYPES[entry.dtype]).reshape(entry.shape)
