"""What a weight file says of itself, before any weight is read. Files come from strangers: all is bounded."""

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

MAX_HEADER_BYTES = 16 << 20  # a full checkpoint with a thumbnail in its header has 1 MB
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
FP8_EXTRA_SUFFIXES = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class WeightHeader:
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_weight_header(path: Path) -> WeightHeader:
    """Of a safetensors or a GGUF file, told apart by their first bytes. ModelError for anything else."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelError(
            f"{path} may be a pickle, which can run code when it is opened, so it never is. Give a"
            " safetensors or GGUF file."
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
    """Of the JSON, at most what is there. The first eight bytes may be any number, the ninth may not."""
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
    if start[8:9] != b"{":
        kind = next(
            (name for magic, name in FILE_KIND_BY_MAGIC.items() if start.startswith(magic)), None
        )
        if kind is not None:
            unsafe = ", which can run code when it is opened, so it never is" * ("pickle" in kind)
            raise ModelError(f"{path} is {kind}{unsafe}. Give a safetensors or GGUF file.")
    if length > size - 8:
        raise ModelError(
            f"{path} is cut short or not a safetensors file ({size:,} bytes). Download it again."
        )
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{path} has a damaged header: {length:,} bytes of names. Download it again."
        )
    return int(length)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _parse_safetensors(path: Path, header: dict[str, Any], start: int, size: int) -> WeightHeader:
    """Every tensor follows the one before without a gap, to the end of the file."""
    metadata = {
        str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()
    }
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header):,} tensors")
    found, spans = {}, []
    for name, entry in header.items():
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
            raise ValueError(f"{name}: a size or place that is no number")
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{name} is of type {entry['dtype']!r}, which is not read")
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        if len(shape) > MAX_DIMENSIONS or math.prod(shape) * dtype.itemsize != last - first:
            raise ValueError(
                f"{name} of shape {shape[:MAX_DIMENSIONS]} does not take its {last - first} bytes"
            )
        found[name] = StoredTensor(path, shape, dtype, start + first)
        spans.append((first, last))
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError("tensors overlap or leave a gap")
        end = last
    if size != start + end:
        raise ModelError(
            f"{path} has {size:,} bytes where its header promises {start + end:,}: it is cut short or"
            " damaged. Download it again."
        )
    return WeightHeader(found, metadata)


def decode_fp8_tensors(found: Mapping[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    """fp8 as bfloat16, which holds it exactly; scaled fp8 multiplied out and rounded once.

    ComfyUI's markers: `x.scale_weight` (or `x.weight_scale`) beside `x.weight`, an empty `scaled_fp8`;
    scales of inputs are for fp8 products and play no part.
    """
    marks = {name for name in found if name.endswith(FP8_EXTRA_SUFFIXES) or name == "scaled_fp8"}
    result = {}
    for name, stored in found.items():
        if name in marks:
            continue
        if stored.dtype not in FP8_DTYPES:
            result[name] = stored
            continue
        stem = name.removesuffix(".weight")
        scales = [found[f"{stem}{mark}"] for mark in SCALE_SUFFIXES if f"{stem}{mark}" in marks]
        scale = (
            _read_scale(scales[0], stored, f"{where}: {name}") if scales and name != stem else None
        )
        result[name] = _as_bfloat16(stored, scale)
    return result


def _read_scale(scale: StoredTensor, stored: StoredTensor, where: str) -> torch.Tensor:
    """One number, or one for each row."""
    rows = stored.shape[0] if len(stored.shape) == 2 else 1
    if (
        scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1))
        or not scale.dtype.is_floating_point
    ):
        raise ModelError(
            f"{where} has a scale of shape {scale.shape}; one number, or one a row, is read."
        )
    value = scale.load().float().reshape(-1, 1)
    if not bool(value.isfinite().all()):
        raise ModelError(f"{where} has a scale that is no finite number.")
    return value


@dataclass(frozen=True)
class _ScaledFp8Tensor(StoredTensor):
    """scales: (1, 1), or (rows, 1) of a matrix; None is 1."""

    scales: torch.Tensor | None = None

    def slice_dim0(self, kept: slice) -> StoredTensor:
        return replace(
            cast(_ScaledFp8Tensor, super().slice_dim0(kept)), scales=self._scales_of_rows(kept)
        )

    def read_rows(self, file: BinaryIO, first: int, count: int) -> torch.Tensor:
        values, scales = (
            super().read_rows(file, first, count),
            self._scales_of_rows(slice(first, first + count)),
        )
        return values if scales is None else (values.float() * scales).bfloat16()

    def _scales_of_rows(self, rows: slice) -> torch.Tensor | None:
        return self.scales if self.scales is None or len(self.scales) == 1 else self.scales[rows]


def _as_bfloat16(stored: StoredTensor, scales: torch.Tensor | None) -> StoredTensor:
    def decode(raw: torch.Tensor) -> torch.Tensor:
        return raw.view(stored.dtype).bfloat16()  # exact

    place = stored.file, stored.shape, torch.bfloat16, stored.offset
    return _ScaledFp8Tensor(*place, decode, stored.columns, scales)
