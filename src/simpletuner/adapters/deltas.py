"""What an adapter adds to a linear: a low-rank pair (LoRA, DoRA), or a product of two matrices (LoHa, LoKr).

out, in: of the linear · r rank
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

# LyCORIS' names of what a product is made of: w1 and w2, each whole or as the pair a @ b.
LYCORIS_FACTOR_NAMES = (
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
)


@dataclass(frozen=True)
class LowRankDelta:
    """delta W = up @ down, alpha already in `up`.

    down: (r, in). up: (out, r). magnitude: (out,), only with DoRA. All float32 on the CPU.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None

    @property
    def kind(self) -> str:
        return "LoRA" if self.magnitude is None else "DoRA"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def scaled(self, by: float) -> LowRankDelta:
        return self if by == 1.0 else LowRankDelta(self.down, self.up * by, self.magnitude)

    def output_terms(self, columns: Tensor) -> list[Tensor]:
        """Delta W @ columns as the sum of these; columns: (in, n) float64."""
        return [self.up.double() @ (self.down.double() @ columns)]

    def add_to(self, weight: Tensor, strength: float) -> None:
        weight.addmm_(self.up.to(weight), self.down.to(weight), alpha=strength)


@dataclass(frozen=True)
class LycorisDelta:
    """delta W = scale * w1 ∘ w2 (LoHa, arXiv 2108.06098) or scale * w1 ⊗ w2 (LoKr, arXiv 2309.14859).

    parts: name of LyCORIS' -> matrix; LoHa's w1 and w2 are (out, in), LoKr's (a, b) and (out / a, in / b).
    rows: those of a fused native matrix that are this linear's; None: all. Float32 on the CPU.
    """

    factors: Mapping[str, Tensor]
    scale: float = 1.0
    rows: slice | None = None
    magnitude: None = None

    @property
    def kind(self) -> str:
        return "LoHa" if is_loha(self.factors) else "LoKr"

    @property
    def rank(self) -> int:
        """Of w2's pair, else of w1's; 0 where both are whole, and alpha means nothing."""
        pairs = (self.factors.get(f"{key_stem(self.factors)}{number}_b") for number in "21")
        return next((pair.shape[0] for pair in pairs if pair is not None), 0)

    @property
    def shape(self) -> tuple[int, int]:
        (_, b), (_, d) = (_factor_shape(self.factors, number) for number in "12")
        height = self.total_rows if self.rows is None else self.rows.stop - self.rows.start
        return height, b if is_loha(self.factors) else b * d

    @property
    def total_rows(self) -> int:
        """Of all rows."""
        (a, _), (c, _) = (_factor_shape(self.factors, number) for number in "12")
        return a if is_loha(self.factors) else a * c

    def scaled(self, by: float) -> LycorisDelta:
        """In w1 where alpha means nothing."""
        if self.rank:
            return LycorisDelta(self.factors, self.scale * by, self.rows)
        return LycorisDelta(
            {**self.factors, "lokr_w1": self.factors["lokr_w1"] * by}, self.scale, self.rows
        )

    def to_dense(self) -> Tensor:
        whole = multiply_factors(self.factors) * self.scale
        return whole if self.rows is None else whole[self.rows]

    def output_terms(self, columns: Tensor) -> list[Tensor]:
        """Without the product itself, which at full size takes minutes for all modules."""
        parts = {name: part.double() for name, part in self.factors.items()}
        if is_loha(parts):
            cores = torch.einsum("rj,sj,jn->nrs", parts["hada_w1_b"], parts["hada_w2_b"], columns)
            whole = torch.einsum("ir,nrs,is->in", parts["hada_w1_a"], cores, parts["hada_w2_a"])
        else:
            w1, w2 = factor_matrix(parts, "1"), factor_matrix(parts, "2")
            pieces = torch.einsum("cd,bdn->bcn", w2, columns.view(w1.shape[1], w2.shape[1], -1))
            whole = torch.einsum("ab,bcn->acn", w1, pieces).flatten(0, 1)
        return [self.scale * (whole if self.rows is None else whole[self.rows])]

    def add_to(self, weight: Tensor, strength: float) -> None:
        weight.add_(self.to_dense().to(weight), alpha=strength)


Delta: TypeAlias = LowRankDelta | LycorisDelta
DeltaT = TypeVar("DeltaT", LowRankDelta, LycorisDelta)


def is_loha(parts: Mapping[str, Tensor]) -> bool:
    return "hada_w1_a" in parts


def key_stem(parts: Mapping[str, Tensor]) -> str:
    return "hada_w" if is_loha(parts) else "lokr_w"


def multiply_factors(parts: Mapping[str, Tensor]) -> Tensor:
    """(out, in), without scale."""
    w1, w2 = (factor_matrix(parts, number) for number in "12")
    return w1 * w2 if is_loha(parts) else torch.kron(w1, w2)


def factor_matrix(parts: Mapping[str, Tensor], number: str) -> Tensor:
    """w1 or w2."""
    name = f"{key_stem(parts)}{number}"
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def invalid_factors_reason(parts: Mapping[str, Tensor]) -> str:
    """Why these are no LoHa and no LoKr; nothing for those that are."""
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    if odd := next((name for name in parts if not name.startswith(key_stem(parts))), ""):
        return f"{odd} is not of its kind"
    for name in (f"{key_stem(parts)}{number}" for number in "12"):
        found = [end for end in ("", "_a", "_b") if f"{name}{end}" in parts]
        if found not in ([""], ["_a", "_b"]):
            return f"{name} is neither one matrix nor a pair"
        mine = [shapes[f"{name}{end}"] for end in found]
        if (
            any(len(shape) != 2 or 0 in shape for shape in mine)
            or mine[0][-1] != mine[-1][-len(found)]
        ):
            return f"shapes {', '.join(map(str, mine))} are no {name}"
    if is_loha(parts) and _factor_shape(parts, "1") != _factor_shape(parts, "2"):
        return "w1 and w2 differ in size"
    return ""


def _factor_shape(parts: Mapping[str, Tensor], number: str) -> tuple[int, int]:
    name = f"{key_stem(parts)}{number}"
    if name in parts:
        return parts[name].shape[0], parts[name].shape[1]
    return parts[f"{name}_a"].shape[0], parts[f"{name}_b"].shape[1]
