"""GGUF: the names and places by a bounded reader of our own, the numbers by the `gguf` package.

That package's own reader loops as often as a header tells it to. Blocks lie along a matrix's rows, so rows
can be cut and read a few at a time, as in any other file.
"""

from __future__ import annotations

import math
import struct
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from simpletuner.errors import MissingExtra, ModelError
from simpletuner.quantization.convert import StoredTensor

UNQUANTIZED_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
# Types of metadata values: their struct code; 8 is a string, 9 an array.
SCALAR_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING_TYPE, ARRAY_TYPE = 8, 9
ALIGNMENT_KEY = "general.alignment"


class _Cursor:
    """Reads forward in the first bytes of a file; ValueError past their end."""

    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 0

    def read_number(self, code: str) -> int:
        try:
            (value,) = struct.unpack_from(f"<{code}", self.content, self.position)
        except struct.error:
            raise ValueError("it ends in the middle") from None
        self.position += struct.calcsize(code)
        return value

    def read_string(self) -> str:
        length = self.read_number("Q")
        self.skip(length)
        return self.content[self.position - length : self.position].decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        if count > len(self.content) - self.position:
            raise ValueError("it ends in the middle")
        self.position += count

    def read_value(self, kind: int) -> str:
        """A metadata value as text; arrays (vocabularies) are passed over."""
        if kind == STRING_TYPE:
            return self.read_string()
        if kind != ARRAY_TYPE:
            return str(self.read_number(SCALAR_FORMATS[kind]))
        inner, count = self.read_number("I"), self.read_number("Q")
        if inner == STRING_TYPE:
            for _ in range(count):  # each takes 8 bytes of a bounded content
                self.read_string()
        else:
            self.skip(count * struct.calcsize(SCALAR_FORMATS[inner]))
        return ""


def parse_gguf_header(path: Path, content: bytes, size: int) -> dict[str, StoredTensor]:
    """content: the file's first bytes, all of its header among them. ModelError for what is damaged."""
    try:
        return _parse(path, _Cursor(content), size)
    except (ValueError, KeyError, OverflowError) as error:
        reason = f"type {error}" if isinstance(error, KeyError) else error
        raise ModelError(
            f"{path} has a damaged GGUF header ({reason}). Download it again."
        ) from None


def _parse(path: Path, cursor: _Cursor, size: int) -> dict[str, StoredTensor]:
    cursor.skip(4)
    version, tensors, values = (
        cursor.read_number("I"),
        cursor.read_number("Q"),
        cursor.read_number("Q"),
    )
    if version not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 are known")
    metadata = {}
    for _ in range(values):  # each takes 12 bytes at least
        key = cursor.read_string()
        metadata[key] = cursor.read_value(cursor.read_number("I"))
    listed = []
    for _ in range(tensors):  # each takes 24 bytes at least
        name, dimensions = cursor.read_string(), cursor.read_number("I")
        if dimensions > 4:
            raise ValueError(f"{name[:80]} has {dimensions} dimensions")
        shape = tuple(cursor.read_number("Q") for _ in range(dimensions))[::-1]
        listed.append((name, shape, cursor.read_number("I"), cursor.read_number("Q")))
    alignment = int(metadata.get(ALIGNMENT_KEY, "32"))
    if not 0 < alignment <= 2**16:
        raise ValueError(f"alignment {alignment}")
    start = -(-cursor.position // alignment) * alignment
    found = {
        name: _stored_tensor(path, name, shape, kind, start + offset)
        for name, shape, kind, offset in listed
    }
    if len(found) != len(listed):
        raise ValueError("a name is there twice")
    end = start
    for one in sorted(found.values(), key=lambda one: one.offset):
        if one.offset < end:
            raise ValueError("tensors overlap")
        end = one.offset + one.size_bytes
    if end > size:
        raise ModelError(
            f"{path} has {size:,} bytes where its header promises {end:,}: it is cut short. Download it"
            " again."
        )
    return found


def _stored_tensor(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> StoredTensor:
    if kind in UNQUANTIZED_DTYPES:
        return StoredTensor(path, shape, UNQUANTIZED_DTYPES[kind], offset)
    package = _import_gguf(path)
    quantised = package.GGMLQuantizationType(kind)
    block, block_bytes = package.GGML_QUANT_SIZES[quantised]
    columns = shape[-1] if shape else 1
    if len(shape) < 2 or columns % block or math.prod(shape) == 0:
        raise ValueError(f"{name[:80]} {shape} in blocks of {block}")
    _decode_rows(path, kind, block, torch.zeros(block_bytes, dtype=torch.uint8))
    decode = partial(_decode_rows, path, kind, columns)
    return StoredTensor(path, shape, torch.bfloat16, offset, decode, columns // block * block_bytes)


def _decode_rows(path: Path, kind: int, columns: int, raw: Tensor) -> Tensor:
    package = _import_gguf(path)
    quantised = package.GGMLQuantizationType(kind)
    block, block_bytes = package.GGML_QUANT_SIZES[quantised]
    rows = raw.numpy().reshape(-1, columns // block * block_bytes)
    try:
        return torch.from_numpy(package.quants.dequantize(rows, quantised)).bfloat16()
    except RuntimeError:  # the library cannot decode this type
        raise ModelError(
            f"{path}: weights of type {quantised.name} are not read; Q8_0 or Q4_K are."
        ) from None


def _import_gguf(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra(
            f"{path.name}, a GGUF file, needs: pip install 'simpletuner[gguf]'"
        ) from error
    return gguf
