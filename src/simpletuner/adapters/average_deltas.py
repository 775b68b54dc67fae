"""The average of several LoRA files.

The mean of the deltas is not the delta of the mean factors: mean(B) mean(A) has cross terms B_i A_j
that no file had. Where all files come from one run, their factors belong together, and averaging
them is what an EMA does: the rank stays and DoRA, LoHa and LoKr work too. Factors of different runs
do not match in their columns, so there the mean of the deltas is formed exactly, with the sum of
the ranks, and reduced to the rank that is wanted by SVD, the best approximation of that rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from simpletuner.adapters.deltas import Delta, LowRankDelta, LycorisDelta
from simpletuner.adapters.merge_deltas import DeltasByModule, sum_weighted_loras, truncate_rank
from simpletuner.adapters.module_names import ModuleNames
from simpletuner.errors import ModelError

WeightedDeltas = Sequence[tuple[DeltasByModule, float]]


def average_deltas(
    parts: WeightedDeltas, rank: int | None, fused_names: ModuleNames | None
) -> tuple[dict[str, Delta], int, float]:
    """Return the mean of the deltas at a rank, that rank, and the relative error.

    The weights add up to 1. rank: None is the largest rank of the files. fused_names: see
    truncate_rank. Raises ModelError for DoRA, and for LoHa and LoKr, whose mean has no such form.
    """
    wanted = rank or max(delta.rank for deltas, _ in parts for delta in deltas.values())
    reduced, error = truncate_rank(sum_weighted_loras(parts), wanted, fused_names)
    return reduced, wanted, error


def average_factors(parts: WeightedDeltas) -> dict[str, Delta]:
    """Return the delta of the mean factors of files from one run; the weights add up to 1.

    Raises ModelError where modules, kinds or shapes differ.
    """
    first = parts[0][0]
    for deltas, _ in parts[1:]:
        if deltas.keys() != first.keys():
            raise ModelError("the files adapt different modules, so they are not from one run")
    return {
        name: _average_module(name, [(deltas[name], weight) for deltas, weight in parts])
        for name in first
    }


def _average_module(name: str, parts: Sequence[tuple[Delta, float]]) -> Delta:
    first = parts[0][0]
    tensors = [(_tensors(delta), weight) for delta, weight in parts]
    shapes = {
        (delta.kind, *((key, tensor.shape) for key, tensor in sorted(held.items())))
        for (delta, _), (held, _) in zip(parts, tensors, strict=True)
    }
    if len(shapes) != 1:
        raise ModelError(f"{name} has another kind or rank in these files: they are not one run's")
    mean = {
        key: sum((held[key].double() * weight for held, weight in tensors), torch.zeros(())).float()
        for key in tensors[0][0]
    }
    if isinstance(first, LycorisDelta):
        return LycorisDelta(mean, first.scale, first.rows)
    return LowRankDelta(mean["down"], mean["up"], mean.get("magnitude"))


def _tensors(delta: Delta) -> Mapping[str, Tensor]:
    if isinstance(delta, LycorisDelta):
        return delta.factors
    held = {"down": delta.down, "up": delta.up}
    return held if delta.magnitude is None else {**held, "magnitude": delta.magnitude}


def relative_distance(one: DeltasByModule, other: DeltasByModule) -> float:
    """Return ||one - other|| / ||other|| in the Frobenius norm over all modules of two LoRAs."""
    difference = total = 0.0
    for name, delta in other.items():
        mine = one[name]
        assert isinstance(delta, LowRankDelta)
        assert isinstance(mine, LowRankDelta)
        # The difference of the two products, as one product.
        up = torch.cat([mine.up, -delta.up], dim=1).double()
        down = torch.cat([mine.down, delta.down]).double()
        difference += _squared_norm(up, down)
        total += _squared_norm(delta.up.double(), delta.down.double())
    return (max(0.0, difference) / total) ** 0.5 if total else 0.0


def _squared_norm(up: Tensor, down: Tensor) -> float:
    """Return ||up @ down||^2 from the Gram matrices, which are rank by rank."""
    return float(((up.T @ up) * (down @ down.T)).sum())
