"""Several LoRAs as one, at any strength, and the nearest one of a smaller rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from simpletuner.adapters import layouts, names
from simpletuner.adapters.layouts import Factors
from simpletuner.errors import ModelError

Loras = Mapping[str, Factors]


def weighted_sum(parts: Sequence[tuple[Loras, float]]) -> dict[str, Factors]:
    """Exact: ranks add up where modules meet. ModelError for a DoRA, whose strength is no factor."""
    if len(parts) == 1 and parts[0][1] == 1.0:
        return dict(parts[0][0])
    _refuse_dora(parts, "be scaled or added to another")
    modules = sorted({name for factors, _ in parts for name in factors})
    found = {}
    for name in modules:
        mine = [(factors[name], weight) for factors, weight in parts if name in factors]
        sizes = {(one.down.shape[1], one.up.shape[0]) for one, _ in mine}
        if len(sizes) != 1:
            raise ModelError(
                f"{name} has different sizes in these files: they were made for different models"
            )
        found[name] = Factors(
            torch.cat([one.down for one, _ in mine]),
            torch.cat([one.up * weight for one, weight in mine], dim=1),
        )
    return found


def reduced(factors: Loras, rank: int, native: bool) -> tuple[dict[str, Factors], float]:
    """No module above `rank`, by singular values: the best there is. And the error as a share of the delta.

    native: of the fused matrices, whose rank it then is. error: in the Frobenius norm over all modules.
    """
    _refuse_dora([(factors, 1.0)], "be reduced in rank")
    whole = layouts.fused(factors) if native else dict(factors)
    found: dict[str, Factors] = {}
    lost = total = 0.0
    for name, one in whole.items():
        small, tail, power = _nearest(one, rank)
        lost, total = lost + tail, total + power
        parts = names.diffusers_names(name) if native else (name,)
        rows = names.split_rows(len(parts), small.up.shape[0], small.down.shape[1])
        found |= {part: Factors(small.down, small.up[at]) for part, at in zip(parts, rows) if part in factors}
    return found, (lost / total) ** 0.5 if total else 0.0


def _nearest(one: Factors, rank: int) -> tuple[Factors, float, float]:
    """By singular values, through a core of rank x rank; what that leaves out and the whole, squared."""
    left, right = torch.linalg.qr(one.up.double()), torch.linalg.qr(one.down.double().t())
    u, s, v = torch.linalg.svd(left.R @ right.R.t())
    power = float(s.square().sum())
    if one.rank <= rank:
        return one, 0.0, power
    root = s[:rank].sqrt()
    down, up = root[:, None] * (v[:rank] @ right.Q.t()), (left.Q @ u[:, :rank]) * root
    return Factors(down.float(), up.float()), float(s[rank:].square().sum()), power


def _refuse_dora(parts: Sequence[tuple[Loras, float]], what: str) -> None:
    if any(one.magnitude is not None for factors, _ in parts for one in factors.values()):
        raise ModelError(f"a DoRA cannot {what}: its magnitudes belong to its own delta")
