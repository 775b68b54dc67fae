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
from simpletuner.quantization.convert import Stored

PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
# Types of metadata values: their struct code; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = "general.alignment"


class _Cursor:
    """Reads forward in the first bytes of a file; ValueError past their end."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, code: str) -> int:
        try:
            (value,) = struct.unpack_from(f"<{code}", self.content, self.at)
        except struct.error:
            raise ValueError("it ends in the middle") from None
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        length = self.take("Q")
        self.skip(length)
        return self.content[self.at - length : self.at].decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        if count > len(self.content) - self.at:
            raise ValueError("it ends in the middle")
        self.at += count

    def value(self, kind: int) -> str:
        """A metadata value as text; arrays (vocabularies) are passed over."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return str(self.take(SCALARS[kind]))
        inner, count = self.take("I"), self.take("Q")
        if inner == STRING:
            for _ in range(count):  # each takes 8 bytes of a bounded content
                self.text()
        else:
            self.skip(count * struct.calcsize(SCALARS[inner]))
        return ""


def parsed(path: Path, content: bytes, size: int) -> dict[str, Stored]:
    """content: the file's first bytes, all of its header among them. ModelError for what is damaged."""
    try:
        return _parsed(path, _Cursor(content), size)
    except (ValueError, KeyError, OverflowError) as error:
        reason = f"type {error}" if isinstance(error, KeyError) else error
        raise ModelError(f"{path} has a damaged GGUF header ({reason}). Download it again.") from None


def _parsed(path: Path, cursor: _Cursor, size: int) -> dict[str, Stored]:
    cursor.skip(4)
    version, tensors, values = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
    if version not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 are known")
    metadata = {}
    for _ in range(values):  # each takes 12 bytes at least
        key = cursor.text()
        metadata[key] = cursor.value(cursor.take("I"))
    listed = []
    for _ in range(tensors):  # each takes 24 bytes at least
        name, dimensions = cursor.text(), cursor.take("I")
        if dimensions > 4:
            raise ValueError(f"{name[:80]} has {dimensions} dimensions")
        shape = tuple(cursor.take("Q") for _ in range(dimensions))[::-1]
        listed.append((name, shape, cursor.take("I"), cursor.take("Q")))
    alignment = int(metadata.get(ALIGNMENT, "32"))
    if not 0 < alignment <= 2**16:
        raise ValueError(f"alignment {alignment}")
    start = -(-cursor.at // alignment) * alignment
    found = {name: _stored(path, name, shape, kind, start + offset) for name, shape, kind, offset in listed}
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


def _stored(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Stored:
    if kind in PLAIN:
        return Stored(path, shape, PLAIN[kind], offset)
    package = _package(path)
    quantised = package.GGMLQuantizationType(kind)
    block, block_bytes = package.GGML_QUANT_SIZES[quantised]
    columns = shape[-1] if shape else 1
    if len(shape) < 2 or columns % block or math.prod(shape) == 0:
        raise ValueError(f"{name[:80]} {shape} in blocks of {block}")
    _decoded(path, kind, block, torch.zeros(block_bytes, dtype=torch.uint8))
    decode = partial(_decoded, path, kind, columns)
    return Stored(path, shape, torch.bfloat16, offset, decode, columns // block * block_bytes)


def _decoded(path: Path, kind: int, columns: int, raw: Tensor) -> Tensor:
    package = _package(path)
    quantised = package.GGMLQuantizationType(kind)
    block, block_bytes = package.GGML_QUANT_SIZES[quantised]
    rows = raw.numpy().reshape(-1, columns // block * block_bytes)
    try:
        return torch.from_numpy(package.quants.dequantize(rows, quantised)).bfloat16()
    except RuntimeError:  # the library cannot decode this type
        raise ModelError(
            f"{path}: weights of type {quantised.name} are not read; Q8_0 or Q4_K are."
        ) from None


def _package(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra(f"{path.name}, a GGUF file, needs: pip install 'simpletuner[gguf]'") from error
    return gguf
