"""One shard: a safetensors file whose metadata carries a CRC-32 per tensor.

The file is written here rather than by the library so that it is synced through the handle that wrote it, a
full disk is an OSError, and every byte range is known for positioned reads (a truncated file then gives a
short read; a memory map would give SIGBUS). Any safetensors reader opens it.
"""

from __future__ import annotations

import json
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
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class DamagedShard(CacheError):
    """The file is not what was written; its text says how."""


@dataclass(frozen=True)
class ShardEntry:
    """Where one tensor lies. name: "<key>/<tensor>". offset, length: bytes from the start of the file."""

    name: str
    offset: int
    length: int
    crc32: int
    dtype: str
    shape: tuple[int, ...]


def write_shard(final: Path, tensors: Mapping[str, Tensor], fingerprint: str) -> None:
    """Appear under the final name complete and synced, or not at all. tensors: "<key>/<tensor>" on the CPU.

    Raises OSError (no space, no permission); the unfinished file is removed.
    """
    # Wide elements first keeps every tensor aligned to its own element size, as the library does.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    raw = {
        name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for name, t in ordered
    }
    header: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "fingerprint": fingerprint,
            "crc32": json.dumps({name: zlib.crc32(data) for name, data in raw.items()}),
        }
    }
    end = 0
    for name, t in ordered:
        start, end = end, end + raw[name].nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = final.with_name(f"{final.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for data in raw.values():
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(final)
    finally:
        unfinished.unlink(missing_ok=True)
    fsync_path(final.parent)


def read_shard_entries(path: Path) -> list[ShardEntry]:
    """Everything an index needs, from the header alone; DamagedShard when header and length disagree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if header_length > min(size - 8, MAX_HEADER_BYTES):
            raise DamagedShard("its header is cut off")
        text = file.read(header_length)
    base = 8 + header_length
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        crc32 = json.loads(metadata["crc32"])
        entries = [
            ShardEntry(
                name,
                base + at["data_offsets"][0],
                at["data_offsets"][1] - at["data_offsets"][0],
                crc32[name],
                at["dtype"],
                tuple(at["shape"]),
            )
            for name, at in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedShard(f"its header cannot be read ({type(error).__name__})") from error
    end = max((entry.offset + entry.length for entry in entries), default=base)
    if end != size:
        raise DamagedShard(f"it is {size} bytes long, its header says {end}")
    return entries


def read_shard_tensor(handle: int, entry: ShardEntry) -> Tensor:
    """One positioned read, checked. Thread-safe: the handle's own position is never used."""
    data = torch.empty(entry.length, dtype=torch.uint8)
    view = data.numpy().data
    got = os.preadv(handle, [view], entry.offset) if entry.length else 0
    if got != entry.length:
        raise DamagedShard(f"'{entry.name}' ends after {got} of {entry.length} bytes")
    if zlib.crc32(view) != entry.crc32:
        raise DamagedShard(f"'{entry.name}' does not have the checksum it was written with")
    return data.view(SAFETENSORS_DTYPES[entry.dtype]).reshape(entry.shape)
