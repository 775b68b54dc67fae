"""Add several LoRAs with weights, and reduce a LoRA to a smaller rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from simpletuner.adapters.deltas import Delta, LowRankDelta, LycorisDelta
from simpletuner.adapters.fused_modules import fuse_modules
from simpletuner.adapters.module_names import ModuleNames
from simpletuner.errors import ModelError

DeltasByModule = Mapping[str, Delta]


def sum_weighted_loras(parts: Sequence[tuple[DeltasByModule, float]]) -> dict[str, Delta]:
    """Return the exact weighted sum; ranks add up for modules that occur in several files.

    Raises ModelError for a DoRA, whose output is not linear in the strength.
    """
    if len(parts) == 1 and parts[0][1] == 1.0:
        return dict(parts[0][0])
    _refuse_dora(parts, "be scaled or added to another")
    if len(parts) == 1:
        return {name: delta.scaled(parts[0][1]) for name, delta in parts[0][0].items()}
    modules = sorted({name for factors, _ in parts for name in factors})
    total: dict[str, Delta] = {}
    for name in modules:
        scaled = [factors[name].scaled(weight) for factors, weight in parts if name in factors]
        pairs = [delta for delta in scaled if isinstance(delta, LowRankDelta)]
        if len({delta.shape for delta in scaled}) != 1:
            raise ModelError(
                f"{name} has different sizes in these files: they were trained on different models"
            )
        if len(pairs) != len(scaled):
            raise ModelError(
                "a LoHa or LoKr cannot be added to another file; reduce it to a LoRA first, with:"
                " simpletuner export FILE --format diffusers --rank N"
            )
        # B1 A1 + B2 A2 is one product, of B1 and B2 side by side and A1 above A2.
        down = torch.cat([delta.down for delta in pairs])
        up = torch.cat([delta.up for delta in pairs], dim=1)
        total[name] = LowRankDelta(down, up)
    return total


def truncate_rank(
    deltas: DeltasByModule, rank: int, fused_names: ModuleNames | None
) -> tuple[dict[str, Delta], float]:
    """Return the deltas with no module above `rank`, and the relative error.

    The truncated SVD is the best approximation of a given rank. fused_names: truncate the
    fused matrices of native layouts, named by this table. The error is in the Frobenius norm over
    all modules. LoHa and LoKr are first approximated by a LoRA; that error is orthogonal to the
    error of the truncation, so their squares add up.
    """
    _refuse_dora([(deltas, 1.0)], "be reduced in rank")
    lost = total = 0.0
    pairs: dict[str, Delta] = {}
    for name, delta in deltas.items():
        pairs[name], discarded = (
            _approximate_low_rank(delta, rank) if isinstance(delta, LycorisDelta) else (delta, 0.0)
        )
        lost, total = lost + discarded, total + discarded
    matrices = fuse_modules(pairs, fused_names) if fused_names else pairs
    truncated: dict[str, Delta] = {}
    for name, delta in matrices.items():
        assert isinstance(delta, LowRankDelta)
        reduced, discarded, squared_norm = _truncate_delta(delta, rank)
        lost, total = lost + discarded, total + squared_norm
        parts: tuple[str, ...] = (name,)
        slices = [slice(0, reduced.up.shape[0])]
        if fused_names:
            parts = fused_names.diffusers_names(name)
            slices = fused_names.fused_row_slices(name, reduced.up.shape[0], reduced.down.shape[1])
        truncated |= {
            part: LowRankDelta(reduced.down, reduced.up[rows_of_part])
            for part, rows_of_part in zip(parts, slices)
            if part in deltas
        }
    return truncated, (lost / total) ** 0.5 if total else 0.0


def _approximate_low_rank(product: LycorisDelta, rank: int) -> tuple[LowRankDelta, float]:
    """Return a LoRA near the product by randomized SVD, and the squared error."""
    delta = product.to_dense()
    # The method starts from random columns: always the same, so that the file is too.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(delta, min(rank + 8, *delta.shape), niter=4)
    root = s[:rank].sqrt()
    pair = LowRankDelta(root[:, None] * v[:, :rank].t(), u[:, :rank] * root)
    # A projection: the squares of the result and of the error add up, but for rounding.
    return pair, max(0.0, float(delta.double().square().sum() - s[:rank].double().square().sum()))


def _truncate_delta(delta: LowRankDelta, rank: int) -> tuple[LowRankDelta, float, float]:
    """Truncate by SVD through a QR core; return factors, squared error and squared norm."""
    # Only the core of rank x rank is decomposed; the whole matrix is never formed.
    left, right = torch.linalg.qr(delta.up.double()), torch.linalg.qr(delta.down.double().t())
    u, s, v = torch.linalg.svd(left.R @ right.R.t())
    squared_norm = float(s.square().sum())
    if delta.rank <= rank:
        return delta, 0.0, squared_norm
    root = s[:rank].sqrt()
    down, up = root[:, None] * (v[:rank] @ right.Q.t()), (left.Q @ u[:, :rank]) * root
    return LowRankDelta(down.float(), up.float()), float(s[rank:].square().sum()), squared_norm


def _refuse_dora(parts: Sequence[tuple[DeltasByModule, float]], operation: str) -> None:
    if any(delta.magnitude is not None for deltas, _ in parts for delta in deltas.values()):
        raise ModelError(f"a DoRA cannot {operation}: its magnitudes belong to its own delta")
