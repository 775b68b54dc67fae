"""A tensor in a weight file: where its bytes are and how they are decoded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from simpletuner.errors import ModelError

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
    """One tensor of a weight file. offset: of its first byte. dtype: after decoding.

    decode: for encoded tensors: the bytes (uint8) of whole rows -> the rows in dtype, in any shape.
    encoded_row_bytes: bytes in the file of one such row. A row is one run along the last dimension.
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
        """Size in the file."""
        return self.rows * self.row_bytes

    def slice_dim0(self, entries: slice) -> StoredTensor:
        """Return entries of the first dimension as a tensor; they are contiguous in the file."""
        count = entries.stop - entries.start
        entry_bytes = self.size_bytes // max(1, self.shape[0])
        row_bytes = (
            count * self.encoded_row_bytes // self.shape[0]
            if len(self.shape) == 1
            else self.encoded_row_bytes
        )
        return replace(
            self,
            shape=(count, *self.shape[1:]),
            offset=self.offset + entries.start * entry_bytes,
            encoded_row_bytes=row_bytes,
        )

    def read_rows(self, file: BinaryIO, first: int, count: int) -> Tensor:
        """Read rows as a new tensor (count, columns)."""
        # On the CPU also where a caller has made another device the default.
        raw = torch.empty(count * self.row_bytes, dtype=torch.uint8, device="cpu")
        file.seek(self.offset + first * self.row_bytes)
        if file.readinto(raw.numpy()) != len(raw):  # type: ignore[attr-defined]
            raise ModelError(f"{self.file} was truncated while it was being read.")
        values = raw.view(self.dtype) if self.decode is None else self.decode(raw)
        return values.view(count, self.columns)

    def view_of(self, content: Tensor) -> Tensor | None:
        """Return the tensor as a view of the whole file's bytes (uint8); None where it is not one.

        Encoded tensors are not, nor are those that are not aligned to their element size.
        """
        if self.decode is not None or self.offset % self.dtype.itemsize:
            return None
        raw = content[self.offset : self.offset + self.size_bytes]
        return raw.view(self.dtype).view(self.shape)

    def load(self) -> Tensor:
        """Read the whole tensor."""
        with self.file.open("rb") as file:
            return self.read_rows(file, 0, self.rows).view(self.shape)
