"""Several LoRAs as one, at any strength, and the nearest one of a smaller rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from simpletuner.adapters import layouts, module_names
from simpletuner.adapters.deltas import Delta, LowRankDelta, LycorisDelta
from simpletuner.errors import ModelError

DeltasByModule = Mapping[str, Delta]


def weighted_sum(parts: Sequence[tuple[DeltasByModule, float]]) -> dict[str, Delta]:
    """Exact: ranks add up where modules meet. ModelError for a DoRA, whose strength is no factor."""
    if len(parts) == 1 and parts[0][1] == 1.0:
        return dict(parts[0][0])
    _refuse_dora(parts, "be scaled or added to another")
    if len(parts) == 1:
        return {name: one.scaled(parts[0][1]) for name, one in parts[0][0].items()}
    modules = sorted({name for factors, _ in parts for name in factors})
    found: dict[str, Delta] = {}
    for name in modules:
        mine = [factors[name].scaled(weight) for factors, weight in parts if name in factors]
        pairs = [one for one in mine if isinstance(one, LowRankDelta)]
        if len({one.shape for one in mine}) != 1:
            raise ModelError(
                f"{name} has different sizes in these files: they were made for different models"
            )
        if len(pairs) != len(mine):
            raise ModelError(
                "a LoHa or LoKr cannot be added to another file; reduce it to a LoRA first"
            )
        down, up = (
            torch.cat([one.down for one in pairs]),
            torch.cat([one.up for one in pairs], dim=1),
        )
        found[name] = LowRankDelta(down, up)
    return found


def truncate_rank(
    factors: DeltasByModule, rank: int, native: bool
) -> tuple[dict[str, Delta], float]:
    """No module above `rank`, by singular values: the best there is. And the error as a share of the delta.

    native: of the fused matrices, whose rank it then is. error: in the Frobenius norm over all modules. LoHa
    and LoKr become LoRA; what that loses is orthogonal to what fusing then loses, so that squares add up.
    """
    _refuse_dora([(factors, 1.0)], "be reduced in rank")
    lost = total = 0.0
    pairs: dict[str, Delta] = {}
    for name, delta in factors.items():
        pairs[name], tail = (
            _approximate_low_rank(delta, rank) if isinstance(delta, LycorisDelta) else (delta, 0.0)
        )
        lost, total = lost + tail, total + tail
    whole = layouts.fuse_qkv(pairs) if native else pairs
    found: dict[str, Delta] = {}
    for name, one in whole.items():
        assert isinstance(one, LowRankDelta)
        small, tail, power = _truncate_delta(one, rank)
        lost, total = lost + tail, total + power
        parts = module_names.diffusers_names(name) if native else (name,)
        rows = module_names.fused_row_slices(len(parts), small.up.shape[0], small.down.shape[1])
        found |= {
            part: LowRankDelta(small.down, small.up[at])
            for part, at in zip(parts, rows)
            if part in factors
        }
    return found, (lost / total) ** 0.5 if total else 0.0


def _approximate_low_rank(one: LycorisDelta, rank: int) -> tuple[LowRankDelta, float]:
    """The same by a randomised decomposition of the whole matrix; and what it leaves out, squared."""
    delta = one.to_dense()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(delta, min(rank + 8, *delta.shape), niter=4)
    root = s[:rank].sqrt()
    pair = LowRankDelta(root[:, None] * v[:, :rank].t(), u[:, :rank] * root)
    return pair, max(0.0, float(delta.double().square().sum() - s[:rank].double().square().sum()))


def _truncate_delta(one: LowRankDelta, rank: int) -> tuple[LowRankDelta, float, float]:
    """By singular values, through a core of rank x rank; what that leaves out and the whole, squared."""
    left, right = torch.linalg.qr(one.up.double()), torch.linalg.qr(one.down.double().t())
    u, s, v = torch.linalg.svd(left.R @ right.R.t())
    power = float(s.square().sum())
    if one.rank <= rank:
        return one, 0.0, power
    root = s[:rank].sqrt()
    down, up = root[:, None] * (v[:rank] @ right.Q.t()), (left.Q @ u[:, :rank]) * root
    return LowRankDelta(down.float(), up.float()), float(s[rank:].square().sum()), power


def _refuse_dora(parts: Sequence[tuple[DeltasByModule, float]], what: str) -> None:
    if any(one.magnitude is not None for factors, _ in parts for one in factors.values()):
        raise ModelError(f"a DoRA cannot {what}: its magnitudes belong to its own delta")
