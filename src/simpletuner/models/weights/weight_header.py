"""Headers of weight files, read without any weight.

Files may come from strangers, so every size is bounded.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.adapters.safetensors_reader import FILE_KIND_BY_MAGIC
from simpletuner.bounded_files import open_regular_file
from simpletuner.errors import ModelError
from simpletuner.models.weights.gguf_header import parse_gguf_header
from simpletuner.quantization.stored_tensor import SAFETENSORS_DTYPES, StoredTensor

MAX_HEADER_BYTES = 16 << 20  # the header of a full checkpoint with a thumbnail has 1 MB
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8


PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class WeightHeader:
    """Tensors and metadata of a weight file."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_weight_header(path: Path) -> WeightHeader:
    """Read the header of a safetensors or GGUF file, recognized by its first bytes.

    Raises ModelError for any other file.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelError(
            f"{path} may be a pickle, which can run code when it is opened. Use a safetensors or"
            " GGUF file."
        )
    try:
        size = path.stat().st_size
        with open_regular_file(path) as file:
            start = file.read(24)
            if start.startswith(b"GGUF"):
                file.seek(0)
                return WeightHeader(
                    parse_gguf_header(path, file.read(min(MAX_HEADER_BYTES, size)), size)
                )
            length = _json_length(path, start, size)
            text = (start[8:] + file.read(max(0, length - 16)))[:length]
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        return _parse_safetensors(
            path, json.loads(text, object_pairs_hook=_reject_duplicates), 8 + len(text), size
        )
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        reason = str(error).split("\n")[0][:120]
        raise ModelError(f"{path} has a damaged header ({reason}). Download it again.") from None


def _json_length(path: Path, start: bytes, size: int) -> int:
    """Return the length of the JSON header, which is at most the rest of the file.

    The first eight bytes hold the length and may have any value; the ninth begins the JSON.
    """
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
    if start[8:9] != b"{":
        file_kind = next(
            (name for magic, name in FILE_KIND_BY_MAGIC.items() if start.startswith(magic)), None
        )
        if file_kind is not None:
            warning = ", which can run code when it is opened" if "pickle" in file_kind else ""
            raise ModelError(f"{path} is {file_kind}{warning}. Use a safetensors or GGUF file.")
    if length > size - 8:
        raise ModelError(
            f"{path} is incomplete or not a safetensors file ({size:,} bytes). Download it again."
        )
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{path} has a damaged header of {length:,} bytes. Download it again.")
    return int(length)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice")
    return names


def _parse_safetensors(path: Path, header: dict[str, Any], start: int, size: int) -> WeightHeader:
    """Return the tensors, which must follow each other without a gap to the end of the file."""
    metadata = {
        str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()
    }
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header):,} tensors")
    tensors = {}
    spans = []
    for name, entry in header.items():
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
            raise ValueError(f"{name} has a size or offset that is not a whole number")
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{name} has the unsupported dtype {entry['dtype']!r}")
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        if len(shape) > MAX_DIMENSIONS or math.prod(shape) * dtype.itemsize != last - first:
            raise ValueError(
                f"{name} of shape {shape[:MAX_DIMENSIONS]} does not fit its {last - first} bytes"
            )
        tensors[name] = StoredTensor(path, shape, dtype, start + first)
        spans.append((first, last))
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError("tensors overlap or leave a gap")
        end = last
    if size != start + end:
        raise ModelError(
            f"{path} has {size:,} bytes, but its header describes {start + end:,}: it is incomplete"
            " or damaged. Download it again."
        )
    return WeightHeader(tensors, metadata)
