"""Weight-only quantization schemes: stored buffers of a matrix and how it is restored.

O rows (outputs) · I columns (inputs) · G groups of 64 columns, the last one padded with zeros

Scales are bfloat16 and every code is exact in bfloat16, so a dequantized weight is rounded exactly
once: in bfloat16 it is the same number whether it is computed there or computed in float32 and then
cast. Only plain torch operations are used, without a fused multiply-add, so that every device and a
compiled graph give the same result.
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
# NF4 codes that are converted to int32 indices at a time; about a 3072 x 3072 matrix.
NF4_CHUNK_CODES = 5 * 2**20
# QLoRA, appendix E (arXiv 2305.14314): quantiles of the normal distribution, including 0.
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
    """A quantization scheme. version: part of file names; increase it when the buffers change.

    quantize: (O, I) floating point -> buffers. Rows are independent: a slice of rows gives the same
    slice of every buffer whose first dimension is O. dequantize: buffers, I, dtype -> (O, I).
    buffer_shapes: O, I -> name -> (shape, dtype), in the order of quantize; it needs no weight.
    """

    name: str
    version: int
    quantize: Callable[[Tensor], dict[str, Tensor]]
    dequantize: Callable[[QuantizedBuffers, int, torch.dtype], Tensor]
    buffer_shapes: Callable[[int, int], BufferShapes]

    def size_bytes(self, rows: int, columns: int) -> int:
        """Return the size of all buffers together."""
        shapes = self.buffer_shapes(rows, columns).values()
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)


def get_scheme(name: str) -> Scheme:
    """Return the scheme of that name. Raises ConfigError with the known names."""
    if name not in SCHEMES:
        raise ConfigError(
            f"unknown quantization scheme {name!r}; the known schemes are: {', '.join(SCHEMES)}"
        )
    return SCHEMES[name]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic; float16 would lose small scales."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _round_up_scale(largest: Tensor, steps: float) -> Tensor:
    """Return the scale in bfloat16, rounded up so that no weight is clipped."""
    exact = (largest / steps).float()
    scale = exact.bfloat16()
    # bfloat16 has 8 significant bits: a factor of 1 + 2^-8 passes the middle to the next number.
    return torch.where(scale < exact, exact * (1 + 2**-8), scale.float()).bfloat16()


def _divide_by_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """Divide weights by their scale; 0 where the scale is 0, since all weights are 0 there."""
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


def _dequantize_per_row(buffers: QuantizedBuffers, columns: int, dtype: torch.dtype) -> Tensor:
    compute_dtype = _compute_dtype(dtype)
    return buffers["codes"].to(compute_dtype).mul_(buffers["scale"].to(compute_dtype)).to(dtype)


def _per_row_shapes(dtype: torch.dtype) -> Callable[[int, int], BufferShapes]:
    return lambda rows, columns: {
        "codes": ((rows, columns), dtype),
        "scale": ((rows, 1), torch.bfloat16),
    }


def _to_groups(weight: Tensor) -> Tensor:
    """Pad and reshape (O, I) to (O, G, 64) float32."""
    weight = F.pad(weight.float(), (0, -weight.shape[1] % GROUP_SIZE))
    groups: Tensor = weight.unflatten(1, (-1, GROUP_SIZE))
    return groups


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes (O, G, 64) in 0..15 to (O, 32 G) uint8, the first of two in the upper half.

    bitsandbytes uses the same order.
    """
    codes = codes.to(torch.uint8).flatten(1)
    return codes[:, ::2] << 4 | codes[:, 1::2]


def _quantize_int4(weight: Tensor) -> dict[str, Tensor]:
    """Quantize to weight = (code + offset) * scale.

    The offset is a multiple of 1/16, so that code + offset is exact in bfloat16.
    """
    groups = _to_groups(weight)
    # 0 is within the range, so that a weight of 0 is restored as nearly 0.
    low, high = (
        groups.amin(2, keepdim=True).clamp_(max=0),
        groups.amax(2, keepdim=True).clamp_(min=0),
    )
    scale = _round_up_scale(high - low, 15)
    # In -15 ... 0 by steps of 1/16: with a code of 0 ... 15 that needs at most 8 bits.
    offset = _divide_by_scale(low, scale).mul_(16).round_().div_(16)
    codes = _divide_by_scale(groups, scale).sub_(offset).round_().clamp_(0, 15)
    return {
        "codes": _pack_nibbles(codes),
        "scale": scale.squeeze(2),
        "offset": offset.bfloat16().squeeze(2),
    }


def _dequantize_int4(buffers: QuantizedBuffers, columns: int, dtype: torch.dtype) -> Tensor:
    codes, compute_dtype = buffers["codes"], _compute_dtype(dtype)
    weights = (
        torch.stack((codes >> 4, codes & 15), -1)
        .view(*buffers["scale"].shape, GROUP_SIZE)
        .to(compute_dtype)
    )
    weights.add_(buffers["offset"].to(compute_dtype)[..., None]).mul_(
        buffers["scale"].to(compute_dtype)[..., None]
    )
    return weights.flatten(1)[:, :columns].to(dtype)


def _int4_shapes(rows: int, columns: int) -> BufferShapes:
    groups = -(-columns // GROUP_SIZE)
    return {
        "codes": ((rows, groups * GROUP_SIZE // 2), torch.uint8),
        "scale": ((rows, groups), torch.bfloat16),
        "offset": ((rows, groups), torch.bfloat16),
    }


def _nf4_level_pairs() -> Tensor:
    """Return (256, 2): the two levels that each byte stands for.

    It is a stored buffer, because a table built at each use would be copied to the device each
    time.
    """
    levels = torch.tensor(NF4_LEVELS, device="cpu")
    return torch.cartesian_prod(levels, levels).bfloat16()


def _quantize_nf4(weight: Tensor) -> dict[str, Tensor]:
    """Quantize to NF4. absmax is exact for bfloat16 weights, such as Chroma's.

    For float32 weights absmax is rounded to bfloat16 after it was used to compute the codes.
    """
    groups = _to_groups(weight)
    absmax = groups.abs().amax(2, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, device=groups.device)
    # Between two levels the nearest one is on this side of their middle.
    boundaries = (levels[1:] + levels[:-1]) / 2
    scaled = groups * torch.where(absmax == 0, 0.0, 1 / absmax)
    return {
        "codes": _pack_nibbles(torch.bucketize(scaled, boundaries, out_int32=True)),
        "absmax": absmax.squeeze(2).bfloat16(),
        "levels": _nf4_level_pairs().to(weight.device),
    }


def _dequantize_nf4(buffers: QuantizedBuffers, columns: int, dtype: torch.dtype) -> Tensor:
    compute_dtype, codes = _compute_dtype(dtype), buffers["codes"]
    levels, absmax = (
        buffers["levels"].to(compute_dtype),
        buffers["absmax"].to(compute_dtype)[..., None],
    )
    # In a compiled graph the indices are never materialized, so no chunks are needed.
    if codes.numel() <= NF4_CHUNK_CODES or torch.compiler.is_compiling():
        weights = F.embedding(codes.int(), levels).view(*buffers["absmax"].shape, GROUP_SIZE)
    else:
        weights = codes.new_empty((*buffers["absmax"].shape, GROUP_SIZE), dtype=compute_dtype)
        # The int32 indices need four times the memory of the codes.
        rows = max(1, NF4_CHUNK_CODES // codes.shape[1])
        for chunk, target in zip(codes.split(rows), weights.split(rows), strict=True):
            target.copy_(F.embedding(chunk.int(), levels).view(target.shape))
    return weights.mul_(absmax).flatten(1)[:, :columns].to(dtype)


def _nf4_shapes(rows: int, columns: int) -> BufferShapes:
    groups = -(-columns // GROUP_SIZE)
    return {
        "codes": ((rows, groups * GROUP_SIZE // 2), torch.uint8),
        "absmax": ((rows, groups), torch.bfloat16),
        "levels": ((256, 2), torch.bfloat16),
    }


# Bytes per weight: 1.001, 1.001, 0.5625, 0.53125. int8 is more accurate than fp8 of the same size.
SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 1, _quantize_int8, _dequantize_per_row, _per_row_shapes(torch.int8)),
        Scheme("fp8", 1, _quantize_fp8, _dequantize_per_row, _per_row_shapes(torch.float8_e4m3fn)),
        Scheme("int4", 1, _quantize_int4, _dequantize_int4, _int4_shapes),
        Scheme("nf4", 1, _quantize_nf4, _dequantize_nf4, _nf4_shapes),
    )
}
