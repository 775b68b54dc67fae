"""Fuse the deltas of q, k, v and mlp into the matrices of native layouts, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from simpletuner.adapters.deltas import (
    Delta,
    LowRankDelta,
    LycorisDelta,
    factor_matrix,
    is_loha,
)
from simpletuner.adapters.module_names import ModuleNames
from simpletuner.errors import ModelError


def fuse_modules(deltas: Mapping[str, Delta], names: ModuleNames) -> dict[str, Delta]:
    """Return native module -> delta, exactly.

    LoRA: parts that share A keep one A; otherwise the result is block-diagonal. LoHa and LoKr: a
    module of its own keeps its factors, and a fused matrix becomes a LoHa (see _stack_products). A
    part that is not adapted gets rows of zeros. Raises ModelError for a DoRA, and for modules
    without a native name.
    """
    groups: dict[str, dict[int, Delta]] = {}
    for name, delta in deltas.items():
        location = names.locate_in_native(name)
        if location is None:
            raise ModelError(
                f"{name} does not have a native name; only the diffusers layout can hold it"
            )
        if delta.magnitude is not None:
            raise ModelError(
                f"the native layouts cannot hold a {delta.kind}, because no program applies one in"
                " them as trained; use the diffusers layout"
            )
        if isinstance(delta, LycorisDelta) and delta.shape[0] < delta.total_rows:
            raise ModelError(
                f"{name} is a part of a fused {delta.kind}, which cannot be written exactly;"
                " simpletuner export --rank N writes a LoRA that approximates it"
            )
        # Parts of one fused matrix are collected by the place that they have in it.
        groups.setdefault(location[0], {})[location[1]] = delta
    return {native: _fuse(native, parts, names) for native, parts in groups.items()}


def _fuse(native: str, parts: Mapping[int, Delta], names: ModuleNames) -> Delta:
    if len(names.diffusers_names(native)) == 1:
        return parts[0]
    heights = names.part_heights(native, next(iter(parts.values())).shape[1])
    for position, delta in parts.items():
        if delta.shape[0] != heights[position]:
            raise ModelError(
                f"{native}: part {position} has {delta.shape[0]} rows, not {heights[position]}"
            )
    pairs = {
        position: (delta.up, delta.down)
        for position, delta in parts.items()
        if isinstance(delta, LowRankDelta)
    }
    products = {
        position: delta for position, delta in parts.items() if isinstance(delta, LycorisDelta)
    }
    if pairs and products:
        raise ModelError(f"{native} holds a LoRA and a LoKr or LoHa; no file can hold both")
    if products:
        return _stack_products(products, heights)
    up, down = _stack_pairs(pairs, heights)
    return LowRankDelta(down, up)


def _stack_pairs(
    pairs: Mapping[int, tuple[Tensor, Tensor]], heights: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return (up, down) whose product is the products up_i @ down_i, one above the other.

    Parts with the same `down` share it; otherwise `up` is block-diagonal. Parts that are missing
    are rows of zeros.
    """
    first = next(iter(pairs.values()))[1]
    # A LoRA that was trained on the fused matrix has one A for all of its parts.
    is_shared = all(
        down.shape == first.shape and torch.equal(down, first) for _, down in pairs.values()
    )
    rank = first.shape[0] if is_shared else sum(down.shape[0] for _, down in pairs.values())
    up = torch.zeros(sum(heights), rank)
    row = column = 0
    for position, height in enumerate(heights):
        if position in pairs:
            part = pairs[position][0]
            up[row : row + height, column : column + part.shape[1]] = part
            column += 0 if is_shared else part.shape[1]
        # Missing parts advance too: their rows stay 0.
        row += height
    down = first if is_shared else torch.cat([pairs[position][1] for position in sorted(pairs)])
    return up, down


def _stack_products(parts: Mapping[int, LycorisDelta], heights: Sequence[int]) -> LycorisDelta:
    """Return one LoHa that is these LoHa or LoKr products, one above the other, exactly.

    A LoKr is a LoHa, w1 ⊗ w2 = (w1 ⊗ 1) ∘ (1 ⊗ w2), whose two factors have the small ranks of w1
    and w2; and LoHas stack like LoRAs, factor by factor. Both ranks are made equal with zeros,
    because programs disagree about which of them alpha is divided by.
    """
    terms = {position: _hadamard_terms(delta) for position, delta in parts.items()}
    factors: dict[str, Tensor] = {}
    stacked = [
        _stack_pairs({position: pair[number] for position, pair in terms.items()}, heights)
        for number in (0, 1)
    ]
    rank = max(down.shape[0] for _, down in stacked)
    for number, (up, down) in enumerate(stacked, 1):
        padding = rank - down.shape[0]
        # Columns of zeros add nothing to a product.
        factors[f"hada_w{number}_a"] = torch.nn.functional.pad(up, (0, padding))
        factors[f"hada_w{number}_b"] = torch.nn.functional.pad(down, (0, 0, 0, padding))
    return LycorisDelta(factors)


def _hadamard_terms(delta: LycorisDelta) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return ((a1, b1), (a2, b2)) with delta = (a1 @ b1) ∘ (a2 @ b2), the scale folded into a1."""
    factors = delta.factors
    if is_loha(factors):
        first = (factors["hada_w1_a"] * delta.scale, factors["hada_w1_b"])
        return first, (factors["hada_w2_a"], factors["hada_w2_b"])
    w1 = factor_matrix(factors, "1")
    (a, b), (c, d) = w1.shape, factor_matrix(factors, "2").shape
    first = (
        (w1 * delta.scale).repeat_interleave(c, dim=0),
        torch.eye(b).repeat_interleave(d, dim=1),
    )
    if "lokr_w2" in factors:
        return first, (factors["lokr_w2"].repeat(a, 1), torch.eye(d).repeat(1, b))
    return first, (factors["lokr_w2_a"].repeat(a, 1), factors["lokr_w2_b"].repeat(1, b))
