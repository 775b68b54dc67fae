"""Squared norms of the deltas of adapters, and of the weights that they change.

No delta W is built: that of a low-rank pair is a trace of r x r matrices,
||B A||^2 = tr((B^T B)(A A^T)), that of a Kronecker product the product of the norms of its factors.
Sums are in float64, because a small delta is a difference of large terms in some initializations.
"""

from __future__ import annotations

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


def _low_rank(delta: LowRankDelta) -> float:
    up, down = delta.up.double(), delta.down.double()
    return max(0.0, float(((up.t() @ up) * (down @ down.t())).sum()))


def _lycoris(delta: LycorisDelta) -> float:
    """Build a LoHa in groups of rows; a part of a fused matrix is built as a whole."""
    if delta.rows is not None:
        return float(delta.to_dense().double().square().sum())
    if not is_loha(delta.factors):
        norms = [
            float(factor_matrix(delta.factors, number).double().square().sum()) for number in "12"
        ]
        return delta.scale**2 * norms[0] * norms[1]
    total = 0.0
    factors = {name: factor.double() for name, factor in delta.factors.items()}
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
