"""safetensors files that are written and read one tensor at a time, also by several ranks.

The bytes are those that safetensors' own save_file writes. Only one tensor is in host memory at
once, and with several ranks it may be gathered from all of them first.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simpletuner.errors import CheckpointError
from simpletuner.quantization.stored_tensor import DTYPE_NAMES, SAFETENSORS_DTYPES

# The order of dtypes in a file, so that every tensor is aligned to its element size.
FILE_ORDER = (
    "U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip


@dataclass(frozen=True)
class WholeTensor:
    """A tensor that ranks hold parts of. load: returns it on rank 0, on the CPU; None elsewhere.

    Every rank must call `load`, for the same tensors in the same order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor | None]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


FileTensors = Mapping[str, Tensor | WholeTensor]


def order_in_file(tensors: FileTensors) -> list[str]:
    """Return the names in the order in which they are written: by dtype, then by name."""
    return sorted(
        tensors, key=lambda name: (FILE_ORDER.index(DTYPE_NAMES[tensors[name].dtype]), name)
    )


def write_tensors(
    path: Path, tensors: FileTensors, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; every rank that holds a part must call send_tensors meanwhile."""
    order = order_in_file(tensors)
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            _write_numbers(file, tensors[name])


def _write_numbers(file: BinaryIO, tensor: Tensor | WholeTensor) -> None:
    # A function, so that a gathered tensor is freed before the next one is gathered.
    whole = tensor.load() if isinstance(tensor, WholeTensor) else tensor.detach()
    assert whole is not None
    flat = whole.cpu().contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().data)


def send_tensors(tensors: FileTensors) -> None:
    """Take part in write_tensors of rank 0."""
    for name in order_in_file(tensors):
        tensor = tensors[name]
        if isinstance(tensor, WholeTensor):
            tensor.load()


def split_into_files(stem: str, sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Return file -> names of its tensors in order, named and split as diffusers does.

    sizes: bytes of each tensor. limit: bytes of a file, unless it holds a single tensor.
    """
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {
        f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


@dataclass(frozen=True)
class StoredSlice:
    """A tensor in a file, of which all or some rows are read."""

    name: str
    shape: tuple[int, ...]
    file: Any

    def read(self, rows: slice | None = None) -> Tensor:
        """Return the tensor on the CPU, or some of its rows; possibly a private view of it."""
        if rows is None:
            whole: Tensor = self.file.get_tensor(self.name)
            return whole
        part: Tensor = self.file.get_slice(self.name)[rows.start : rows.stop]
        return part


def iter_stored(path: Path) -> Iterator[StoredSlice]:
    """Yield the tensors of a file. Raises CheckpointError for a damaged one."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                shape = tuple(file.get_slice(name).get_shape())
                yield StoredSlice(name, shape, file)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in safetensors files."""
    return DTYPE_NAMES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of that name in safetensors files."""
    return SAFETENSORS_DTYPES[name]
