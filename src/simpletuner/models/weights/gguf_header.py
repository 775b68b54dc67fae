"""GGUF files: a bounded header reader, and values decoded by the `gguf` package.

The package's own reader allocates as much as a header asks for, so it is not used on untrusted
files. Quantization blocks run along the rows of a matrix, so rows can be sliced and read a few at a
time, as in any other file.
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
from simpletuner.quantization.stored_tensor import StoredTensor

UNQUANTIZED_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
# Type of a metadata value -> its struct code; 8 is a string, 9 an array.
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
    """Reads forward through the first bytes of a file; raises ValueError at their end."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def read_number(self, code: str) -> int:
        value: int
        try:
            (value,) = struct.unpack_from(f"<{code}", self.content, self.position)
        except struct.error:
            raise ValueError("it is incomplete") from None
        self.position += struct.calcsize(code)
        return value

    def read_string(self) -> str:
        length = self.read_number("Q")
        self.skip(length)
        return self.content[self.position - length : self.position].decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        if count > len(self.content) - self.position:
            raise ValueError("it is incomplete")
        self.position += count

    def read_value(self, kind: int) -> str:
        """Read a metadata value as text; arrays (vocabularies) are skipped."""
        if kind == STRING_TYPE:
            return self.read_string()
        if kind != ARRAY_TYPE:
            return str(self.read_number(SCALAR_FORMATS[kind]))
        inner, count = self.read_number("I"), self.read_number("Q")
        if inner == STRING_TYPE:
            for _ in range(count):  # bounded, because each takes at least 8 bytes
                self.read_string()
        else:
            self.skip(count * struct.calcsize(SCALAR_FORMATS[inner]))
        return ""


def parse_gguf_header(path: Path, content: bytes, size: int) -> dict[str, StoredTensor]:
    """Return the tensors of a GGUF file. Raises ModelError for a damaged header.

    content: the first bytes of the file, including its whole header. size: of the file.
    """
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
        raise ValueError(f"version {version} is not supported; 2 and 3 are")
    metadata = {}
    for _ in range(values):  # bounded, because each takes at least 12 bytes
        key = cursor.read_string()
        metadata[key] = cursor.read_value(cursor.read_number("I"))
    listed = []
    for _ in range(tensors):  # bounded, because each takes at least 24 bytes
        name, dimensions = cursor.read_string(), cursor.read_number("I")
        if dimensions > 4:
            raise ValueError(f"{name[:80]} has {dimensions} dimensions")
        shape = tuple(cursor.read_number("Q") for _ in range(dimensions))[::-1]
        listed.append((name, shape, cursor.read_number("I"), cursor.read_number("Q")))
    alignment = int(metadata.get(ALIGNMENT_KEY, "32"))
    if not 0 < alignment <= 2**16:
        raise ValueError(f"alignment {alignment}")
    start = -(-cursor.position // alignment) * alignment
    stored = {
        name: _stored_tensor(path, name, shape, kind, start + offset)
        for name, shape, kind, offset in listed
    }
    if len(stored) != len(listed):
        raise ValueError("a name occurs twice")
    end = start
    for tensor in sorted(stored.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise ValueError("tensors overlap")
        end = tensor.offset + tensor.size_bytes
    if end > size:
        raise ModelError(
            f"{path} has {size:,} bytes, but its header describes {end:,}: it is incomplete."
            " Download it again."
        )
    return stored


def _stored_tensor(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> StoredTensor:
    if kind in UNQUANTIZED_DTYPES:
        return StoredTensor(path, shape, UNQUANTIZED_DTYPES[kind], offset)
    package = _import_gguf(path)
    quantization = package.GGMLQuantizationType(kind)
    block, block_bytes = package.GGML_QUANT_SIZES[quantization]
    columns = shape[-1] if shape else 1
    if len(shape) < 2 or columns % block or math.prod(shape) == 0:
        raise ValueError(f"{name[:80]} {shape} in blocks of {block}")
    _decode_rows(path, kind, block, torch.zeros(block_bytes, dtype=torch.uint8))
    decode = partial(_decode_rows, path, kind, columns)
    return StoredTensor(path, shape, torch.bfloat16, offset, decode, columns // block * block_bytes)


def _decode_rows(path: Path, kind: int, columns: int, raw: Tensor) -> Tensor:
    package = _import_gguf(path)
    quantization = package.GGMLQuantizationType(kind)
    block, block_bytes = package.GGML_QUANT_SIZES[quantization]
    rows = raw.numpy().reshape(-1, columns // block * block_bytes)
    try:
        return torch.from_numpy(package.quants.dequantize(rows, quantization)).bfloat16()
    except RuntimeError:  # the library cannot decode this type
        raise ModelError(
            f"{path}: weights of type {quantization.name} are not supported; use a Q8_0 or Q4_K"
            " file."
        ) from None


def _import_gguf(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra(
            f"reading the GGUF file {path.name} needs: pip install 'simpletuner[gguf]'"
        ) from error
    return gguf
