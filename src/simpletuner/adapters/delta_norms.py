"""Squared norms of the deltas of adapters, and of the weights that they change.

No delta W is built: that of a low-rank pair is a trace of r x r matrices,
||B A||^2 = tr((B^T B)(A A^T)), that of a Kronecker product the product of the norms of its factors.
Measurements sum in float64, because a small delta is a difference of large terms in some
initializations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from simpletuner.adapters.adapted_linear import AdaptedLinear, DequantizableLinear
from simpletuner.adapters.deltas import LowRankDelta, LycorisDelta, factor_matrix, is_loha
from simpletuner.adapters.dora_linear import DoraLinear

ROWS_AT_ONCE = 1024


@torch.no_grad()
def squared_change(module: AdaptedLinear) -> float:
    """Return the squared Frobenius norm of the change of the weight at strength 1."""
    if isinstance(module, DoraLinear):
        return _dora_change(module)
    delta = module.to_delta()
    return _low_rank(delta) if isinstance(delta, LowRankDelta) else _lycoris(delta)


def low_rank_squared_norm(up: Tensor, down: Tensor) -> Tensor:
    """Return ||up @ down||_F^2 in their dtype. up: (out, r). down: (r, in)."""
    # tr(P Q) is the sum of P * Q^T, and both are symmetric.
    norm: Tensor = ((up.t() @ up) * (down @ down.t())).sum()
    return norm


def lokr_squared_norm(factors: Mapping[str, Tensor]) -> Tensor:
    """Return ||w1 kron w2||_F^2 in the dtype of the factors, each a matrix or a low-rank pair."""
    norms = []
    for number in "12":
        first, second = (factors.get(f"lokr_w{number}_{part}") for part in "ab")
        if first is not None and second is not None:
            norms.append(low_rank_squared_norm(first, second))
        else:
            norms.append(factor_matrix(factors, number).square().sum())
    return norms[0] * norms[1]


def _low_rank(delta: LowRankDelta) -> float:
    return max(0.0, float(low_rank_squared_norm(delta.up.double(), delta.down.double())))


def _lycoris(delta: LycorisDelta) -> float:
    """Build a LoHa in groups of rows; a part of a fused matrix is built as a whole."""
    if delta.rows is not None:
        return float(delta.to_dense().double().square().sum())
    factors = {name: factor.double() for name, factor in delta.factors.items()}
    if not is_loha(factors):
        return delta.scale**2 * max(0.0, float(lokr_squared_norm(factors)))
    total = 0.0
    parts = zip(
        factors["hada_w1_a"].split(ROWS_AT_ONCE),
        factors["hada_w2_a"].split(ROWS_AT_ONCE),
        strict=True,
    )
    for first, second in parts:
        product = (first @ factors["hada_w1_b"]) * (second @ factors["hada_w2_b"])
        total += float(product.square().sum())
    return delta.scale**2 * total


def _dora_change(module: DoraLinear) -> float:
    """Return ||m (W + D) / n - W||^2 over the rows (or columns), n being the norms of W + D.

    Of each row it is m^2 - 2 (m / n) (||W||^2 + W . D) + ||W||^2, and n^2 holds W . D.
    """
    up, down, scale = module.up.double(), module.down.double(), module.scale
    base, norms = module.base_squares.double(), module.adapted_norms().double()
    if module.row_norms.ndim == 1:
        own = scale**2 * ((up @ (down @ down.t())) * up).sum(1)
    else:
        own = scale**2 * (((up.t() @ up) @ down) * down).sum(0, keepdim=True)
    crossed = (norms.square() - base - own) / 2
    magnitude = module.row_norms.double()
    change = magnitude.square() - 2 * magnitude / norms * (base + crossed) + base
    return max(0.0, float(change.sum()))


@torch.no_grad()
def squared_weight(base_layer: nn.Module) -> float:
    """Return the squared Frobenius norm of a linear's weight; a quantised one is decoded."""
    if isinstance(base_layer, DequantizableLinear):
        dequantize, buffers = base_layer.dequantizer()
        weight = dequantize(torch.float32, *buffers)
    else:
        weight = cast(Tensor, base_layer.weight)
    rows = weight.detach().split(ROWS_AT_ONCE)
    return sum(float(part.float().square().sum(dtype=torch.float64)) for part in rows)
