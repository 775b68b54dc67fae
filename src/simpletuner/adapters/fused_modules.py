"""Fuse the LoRA deltas of q, k, v and mlp into the matrices of native layouts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from simpletuner.adapters.deltas import Delta, LowRankDelta, LycorisDelta
from simpletuner.adapters.module_names import ModuleNames
from simpletuner.errors import ModelError


def fuse_modules(deltas: Mapping[str, Delta], names: ModuleNames) -> dict[str, LowRankDelta]:
    """Return native module -> delta, exactly.

    Parts that share A keep one A; otherwise the result is block-diagonal. A part that is not
    adapted gets rows of zeros. Raises ModelError for anything but LoRA, and for modules without a
    native name.
    """
    groups: dict[str, dict[int, LowRankDelta]] = {}
    for name, delta in deltas.items():
        location = names.locate_in_native(name)
        if location is None:
            raise ModelError(
                f"{name} does not have a native name; only the diffusers layout can hold it"
            )
        if isinstance(delta, LycorisDelta) or delta.magnitude is not None:
            raise ModelError(
                f"the native layouts cannot hold a {delta.kind}, because no program applies one in"
                " them as trained; use the diffusers layout"
            )
        groups.setdefault(location[0], {})[location[1]] = delta
    return {native: _fuse(native, parts, names) for native, parts in groups.items()}


def _fuse(native: str, parts: Mapping[int, LowRankDelta], names: ModuleNames) -> LowRankDelta:
    if len(names.diffusers_names(native)) == 1:
        return parts[0]
    first = next(iter(parts.values()))
    heights = names.part_heights(native, first.down.shape[1])
    is_shared = all(
        part.down.shape == first.down.shape and torch.equal(part.down, first.down)
        for part in parts.values()
    )
    rank = first.rank if is_shared else sum(part.rank for part in parts.values())
    up = torch.zeros(sum(heights), rank)
    row = 0
    column = 0
    for position, height in enumerate(heights):
        if position in parts:
            part_up = parts[position].up
            if part_up.shape[0] != height:
                raise ModelError(
                    f"{native}: part {position} has {part_up.shape[0]} rows, not {height}"
                )
            up[row : row + height, column : column + part_up.shape[1]] = part_up
            column += 0 if is_shared else part_up.shape[1]
        row += height
    down = first.down if is_shared else torch.cat([parts[key].down for key in sorted(parts)])
    return LowRankDelta(down, up)
