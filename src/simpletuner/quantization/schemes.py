"""Fewer bits per weight: what each scheme keeps of a matrix, and how the matrix comes back.

O rows (outputs) · I columns (inputs) · G groups of 64 columns, the last one filled up with zeros

Scales are bfloat16 and every code is exact in bfloat16, so a restored weight is rounded exactly once: the
same number in bfloat16 whether it is restored there or in float32 and cast. Plain torch operations without
a fused multiply-add to differ by: one result on every device and in a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simpletuner.errors import ConfigError

GROUP_SIZE = 64
FP8_MAX = 448.0
NF4_CHUNK_CODES = (
    5 * 2**20
)  # NF4 codes (a 3072 x 3072 matrix) that are int32 at a time, for the table
# QLoRA, appendix E (arXiv 2305.14314): quantiles of the normal distribution, 0 among them.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

QuantizedBuffers = Mapping[str, Tensor]
BufferShapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Scheme:
    """version: part of a stored file's name; a change of what is stored needs another one.

    quantize: (O, I) floating point -> parts. Rows are independent: a slice of rows gives the same slice of
    every part whose shape begins with O. dequantize: parts, I, dtype -> (O, I). part_shapes: O, I -> name ->
    (shape, dtype), in the order of quantize; no weight is needed.
    """

    name: str
    version: int
    quantize: Callable[[Tensor], dict[str, Tensor]]
    dequantize: Callable[[QuantizedBuffers, int, torch.dtype], Tensor]
    buffer_shapes: Callable[[int, int], BufferShapes]

    def size_bytes(self, rows: int, columns: int) -> int:
        """Of all parts together."""
        shapes = self.buffer_shapes(rows, columns).values()
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)


def get_scheme(name: str) -> Scheme:
    """The scheme of that name; ConfigError with the names that there are."""
    if name not in SCHEMES:
        raise ConfigError(f"no quantisation {name!r}; there are: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where the arithmetic is done: float16 would lose small scales, float64 gains nothing."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _round_up_scale(largest: Tensor, steps: float) -> Tensor:
    """bfloat16, rounded up so that nothing is clipped."""
    wanted = (largest / steps).float()
    scale = wanted.bfloat16()
    return torch.where(scale < wanted, wanted * (1 + 2**-8), scale.float()).bfloat16()


def _divide_by_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """0 where the scale is 0: there all weights are."""
    return weight / torch.where(scale == 0, 1.0, scale.float())


def _quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    weight = weight.float()
    scale = _round_up_scale(weight.abs().amax(1, keepdim=True), 127)
    codes = _divide_by_scale(weight, scale).round_().clamp_(-127, 127)
    return {"codes": codes.to(torch.int8), "scale": scale}


def _quantize_fp8(weight: Tensor) -> dict[str, Tensor]:
    weight = weight.float()
    scale = _round_up_scale(weight.abs().amax(1, keepdim=True), FP8_MAX)
    codes = _divide_by_scale(weight, scale).clamp_(-FP8_MAX, FP8_MAX)
    return {"codes": codes.to(torch.float8_e4m3fn), "scale": scale}


def _dequantize_per_row(parts: QuantizedBuffers, columns: int, dtype: torch.dtype) -> Tensor:
    work = _compute_dtype(dtype)
    return parts["codes"].to(work).mul_(parts["scale"].to(work)).to(dtype)


def _per_row_shapes(dtype: torch.dtype) -> Callable[[int, int], BufferShapes]:
    return lambda rows, columns: {
        "codes": ((rows, columns), dtype),
        "scale": ((rows, 1), torch.bfloat16),
    }


def _to_groups(weight: Tensor) -> Tensor:
    """(O, I) -> (O, G, 64) float32"""
    weight = F.pad(weight.float(), (0, -weight.shape[1] % GROUP_SIZE))
    return weight.unflatten(1, (-1, GROUP_SIZE))


def _pack_nibbles(codes: Tensor) -> Tensor:
    """(O, G, 64) of 0..15 -> (O, 32 G) uint8; the first of two columns in the upper half (bitsandbytes)."""
    codes = codes.to(torch.uint8).flatten(1)
    return codes[:, ::2] << 4 | codes[:, 1::2]


def _quantize_int4(weight: Tensor) -> dict[str, Tensor]:
    """Weight = (code + offset) * scale. offset in steps of 1/16, so that code + offset is exact."""
    groups = _to_groups(weight)
    low, high = (
        groups.amin(2, keepdim=True).clamp_(max=0),
        groups.amax(2, keepdim=True).clamp_(min=0),
    )
    scale = _round_up_scale(high - low, 15)
    offset = _divide_by_scale(low, scale).mul_(16).round_().div_(16)
    codes = _divide_by_scale(groups, scale).sub_(offset).round_().clamp_(0, 15)
    return {
        "codes": _pack_nibbles(codes),
        "scale": scale.squeeze(2),
        "offset": offset.bfloat16().squeeze(2),
    }


def _dequantize_int4(parts: QuantizedBuffers, columns: int, dtype: torch.dtype) -> Tensor:
    codes, work = parts["codes"], _compute_dtype(dtype)
    both = (
        torch.stack((codes >> 4, codes & 15), -1).view(*parts["scale"].shape, GROUP_SIZE).to(work)
    )
    both.add_(parts["offset"].to(work)[..., None]).mul_(parts["scale"].to(work)[..., None])
    return both.flatten(1)[:, :columns].to(dtype)


def _int4_shapes(rows: int, columns: int) -> BufferShapes:
    groups = -(-columns // GROUP_SIZE)
    return {
        "codes": ((rows, groups * GROUP_SIZE // 2), torch.uint8),
        "scale": ((rows, groups), torch.bfloat16),
        "offset": ((rows, groups), torch.bfloat16),
    }


def _nf4_level_pairs() -> Tensor:
    """(256, 2): the two levels that a byte stands for. A part of its own, since a table made at each use
    would be copied to the device each time.
    """
    levels = torch.tensor(NF4_LEVELS, device="cpu")
    return torch.cartesian_prod(levels, levels).bfloat16()


def _quantize_nf4(weight: Tensor) -> dict[str, Tensor]:
    """Absmax is exact for bfloat16 weights, which Chroma's are; of float32 ones it is rounded after use."""
    groups = _to_groups(weight)
    absmax = groups.abs().amax(2, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, device=groups.device)
    between = (levels[1:] + levels[:-1]) / 2
    scaled = groups * torch.where(absmax == 0, 0.0, 1 / absmax)
    return {
        "codes": _pack_nibbles(torch.bucketize(scaled, between, out_int32=True)),
        "absmax": absmax.squeeze(2).bfloat16(),
        "levels": _nf4_level_pairs().to(weight.device),
    }


def _dequantize_nf4(parts: QuantizedBuffers, columns: int, dtype: torch.dtype) -> Tensor:
    work, codes = _compute_dtype(dtype), parts["codes"]
    levels, absmax = parts["levels"].to(work), parts["absmax"].to(work)[..., None]
    if (
        codes.numel() <= NF4_CHUNK_CODES or torch.compiler.is_compiling()
    ):  # compiled, they are no tensor at all
        both = F.embedding(codes.int(), levels).view(*parts["absmax"].shape, GROUP_SIZE)
    else:
        both = codes.new_empty((*parts["absmax"].shape, GROUP_SIZE), dtype=work)
        rows = max(1, NF4_CHUNK_CODES // codes.shape[1])
        for piece, place in zip(codes.split(rows), both.split(rows), strict=True):
            place.copy_(F.embedding(piece.int(), levels).view(place.shape))
    return both.mul_(absmax).flatten(1)[:, :columns].to(dtype)


def _nf4_shapes(rows: int, columns: int) -> BufferShapes:
    groups = -(-columns // GROUP_SIZE)
    return {
        "codes": ((rows, groups * GROUP_SIZE // 2), torch.uint8),
        "absmax": ((rows, groups), torch.bfloat16),
        "levels": ((256, 2), torch.bfloat16),
    }


# Bytes per weight: 1.001, 1.001, 0.5625, 0.53125. int8 errs less than fp8 at the same size.
SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 1, _quantize_int8, _dequantize_per_row, _per_row_shapes(torch.int8)),
        Scheme("fp8", 1, _quantize_fp8, _dequantize_per_row, _per_row_shapes(torch.float8_e4m3fn)),
        Scheme("int4", 1, _quantize_int4, _dequantize_int4, _int4_shapes),
        Scheme("nf4", 1, _quantize_nf4, _dequantize_nf4, _nf4_shapes),
    )
}
