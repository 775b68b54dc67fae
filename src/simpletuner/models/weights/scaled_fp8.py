"""Decode fp8 weights, plain or with ComfyUI's scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

import torch

from simpletuner.errors import ModelError
from simpletuner.quantization.stored_tensor import StoredTensor

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
FP8_EXTRA_SUFFIXES = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")


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
