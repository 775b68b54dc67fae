"""Headers of weight files, read without any weight.

Files may come from strangers, so every size is bounded.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from simpletuner.adapters.safetensors_reader import FILE_KIND_BY_MAGIC
from simpletuner.errors import ModelError
from simpletuner.models.chroma import gguf_reader
from simpletuner.quantization.convert import SAFETENSORS_DTYPES, StoredTensor

MAX_HEADER_BYTES = 16 << 20  # the header of a full checkpoint with a thumbnail has 1 MB
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
FP8_EXTRA_SUFFIXES = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")
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
            f"{path} may be a pickle, which can run code when it is opened. Use a safetensors or GGUF"
            " file."
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(24)
            if start.startswith(b"GGUF"):
                file.seek(0)
                return WeightHeader(
                    gguf_reader.parse_gguf_header(
                        path, file.read(min(MAX_HEADER_BYTES, size)), size
                    )
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


def decode_fp8_tensors(tensors: Mapping[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    """Decode fp8 tensors: exactly to bfloat16, or multiplied by their scale and rounded once.

    ComfyUI marks scaled fp8 by `x.scale_weight` (or `x.weight_scale`) next to `x.weight` and an
    empty `scaled_fp8`. Scales of inputs are only needed for fp8 matmuls and are ignored.
    """
    markers = {
        name for name in tensors if name.endswith(FP8_EXTRA_SUFFIXES) or name == "scaled_fp8"
    }
    decoded = {}
    for name, stored in tensors.items():
        if name in markers:
            continue
        if stored.dtype not in FP8_DTYPES:
            decoded[name] = stored
            continue
        stem = name.removesuffix(".weight")
        scales = [
            tensors[f"{stem}{suffix}"] for suffix in SCALE_SUFFIXES if f"{stem}{suffix}" in markers
        ]
        scale = (
            _read_scale(scales[0], stored, f"{where}: {name}") if scales and name != stem else None
        )
        decoded[name] = _as_bfloat16(stored, scale)
    return decoded


def _read_scale(scale: StoredTensor, stored: StoredTensor, where: str) -> torch.Tensor:
    """Read a scale: one number, or one per row."""
    rows = stored.shape[0] if len(stored.shape) == 2 else 1
    if (
        scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1))
        or not scale.dtype.is_floating_point
    ):
        raise ModelError(
            f"{where} has a scale of shape {scale.shape}; only one number, or one per row, is"
            " supported."
        )
    value = scale.load().float().reshape(-1, 1)
    if not bool(value.isfinite().all()):
        raise ModelError(f"{where} has a scale that is not a finite number.")
    return value


@dataclass(frozen=True)
class _ScaledFp8Tensor(StoredTensor):
    """An fp8 tensor. scales: (1, 1), or (rows, 1) for a matrix; None means 1."""

    scales: torch.Tensor | None = None

    def slice_dim0(self, entries: slice) -> StoredTensor:
        return replace(
            cast(_ScaledFp8Tensor, super().slice_dim0(entries)),
            scales=self._scales_of_rows(entries),
        )

    def read_rows(self, file: BinaryIO, first: int, count: int) -> torch.Tensor:
        values = super().read_rows(file, first, count)
        scales = self._scales_of_rows(slice(first, first + count))
        return values if scales is None else (values.float() * scales).bfloat16()

    def _scales_of_rows(self, rows: slice) -> torch.Tensor | None:
        return self.scales if self.scales is None or len(self.scales) == 1 else self.scales[rows]


def _as_bfloat16(stored: StoredTensor, scales: torch.Tensor | None) -> StoredTensor:
    def decode(raw: torch.Tensor) -> torch.Tensor:
        return raw.view(stored.dtype).bfloat16()  # exact

    return _ScaledFp8Tensor(
        stored.file, stored.shape, torch.bfloat16, stored.offset, decode, stored.columns, scales
    )
