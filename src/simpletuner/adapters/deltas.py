"""Weight deltas of adapters: low-rank pairs (LoRA, DoRA) and products (LoHa, LoKr).

out, in: sizes of the linear · r rank
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

# LyCORIS' names of the factors w1 and w2; each is one matrix or a pair a @ b.
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
    """delta W = up @ down, with alpha folded into `up`.

    down: (r, in). up: (out, r). magnitude: with DoRA, else None; (out,) are norms of the rows of
    W + delta W, one per output, and (1, in) are norms of its columns, one per input, as OneTrainer
    trains them by default. All float32 on the CPU.
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

    def scaled(self, factor: float) -> LowRankDelta:
        return self if factor == 1.0 else LowRankDelta(self.down, self.up * factor, self.magnitude)

    def output_terms(self, columns: Tensor) -> list[Tensor]:
        """Return terms whose sum is delta W @ columns; columns: (in, n) float64."""
        return [self.up.double() @ (self.down.double() @ columns)]

    def add_to(self, weight: Tensor, strength: float) -> None:
        weight.addmm_(self.up.to(weight), self.down.to(weight), alpha=strength)


@dataclass(frozen=True)
class LycorisDelta:
    """delta W = scale * w1 ∘ w2 (LoHa, arXiv 2108.06098) or scale * w1 ⊗ w2 (LoKr, 2309.14859).

    factors: LyCORIS' name -> matrix. LoHa's w1 and w2 are (out, in); LoKr's are (a, b) and (out /
    a, in / b). rows: the rows of a fused native matrix that belong to this linear; None means all.
    Float32 on the CPU.
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
        """Rank of w2, or else of w1; 0 if neither is decomposed, and alpha is then unused."""
        pairs = (self.factors.get(f"{key_stem(self.factors)}{number}_b") for number in "21")
        return next((pair.shape[0] for pair in pairs if pair is not None), 0)

    @property
    def shape(self) -> tuple[int, int]:
        (_, b), (_, d) = (_factor_shape(self.factors, number) for number in "12")
        height = self.total_rows if self.rows is None else self.rows.stop - self.rows.start
        return height, b if is_loha(self.factors) else b * d

    @property
    def total_rows(self) -> int:
        """Number of output rows before `rows` selects a slice."""
        (a, _), (c, _) = (_factor_shape(self.factors, number) for number in "12")
        return a if is_loha(self.factors) else a * c

    def scaled(self, factor: float) -> LycorisDelta:
        """Scale the delta; the factor is folded into w1 when the rank is 0."""
        # A file without a rank has no alpha that could hold the scale.
        if self.rank:
            return LycorisDelta(self.factors, self.scale * factor, self.rows)
        return LycorisDelta(
            {**self.factors, "lokr_w1": self.factors["lokr_w1"] * factor}, self.scale, self.rows
        )

    def to_dense(self) -> Tensor:
        product = multiply_factors(self.factors) * self.scale
        return product if self.rows is None else product[self.rows]

    def output_terms(self, columns: Tensor) -> list[Tensor]:
        """Return the terms without building the product, which would take minutes per network."""
        factors = {name: factor.double() for name, factor in self.factors.items()}
        if is_loha(factors):
            # sum_j (sum_r a1_ir b1_rj) (sum_s a2_is b2_sj) x_jn, with the sum over j first.
            cores = torch.einsum(
                "rj,sj,jn->nrs", factors["hada_w1_b"], factors["hada_w2_b"], columns
            )
            product = torch.einsum(
                "ir,nrs,is->in", factors["hada_w1_a"], cores, factors["hada_w2_a"]
            )
        else:
            w1, w2 = factor_matrix(factors, "1"), factor_matrix(factors, "2")
            pieces = torch.einsum("cd,bdn->bcn", w2, columns.view(w1.shape[1], w2.shape[1], -1))
            product = torch.einsum("ab,bcn->acn", w1, pieces).flatten(0, 1)
        return [self.scale * (product if self.rows is None else product[self.rows])]

    def add_to(self, weight: Tensor, strength: float) -> None:
        weight.add_(self.to_dense().to(weight), alpha=strength)


Delta: TypeAlias = LowRankDelta | LycorisDelta
DeltaT = TypeVar("DeltaT", LowRankDelta, LycorisDelta)


def is_loha(factors: Mapping[str, Tensor]) -> bool:
    """Return whether these are factors of a LoHa rather than a LoKr."""
    return "hada_w1_a" in factors


def key_stem(factors: Mapping[str, Tensor]) -> str:
    """Return the common start of the factors' names."""
    return "hada_w" if is_loha(factors) else "lokr_w"


def multiply_factors(factors: Mapping[str, Tensor]) -> Tensor:
    """Return w1 ∘ w2 or w1 ⊗ w2, (out, in), without scale."""
    w1, w2 = (factor_matrix(factors, number) for number in "12")
    return w1 * w2 if is_loha(factors) else torch.kron(w1, w2)


def factor_matrix(factors: Mapping[str, Tensor], number: str) -> Tensor:
    """Return w1 or w2, multiplying its pair if it is decomposed."""
    name = f"{key_stem(factors)}{number}"
    return factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]


def apply_kronecker(x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    """Apply (w1 ⊗ w2) to x: w2 on pieces of x, then w1 across them; (..., b d) -> (..., a c)."""
    w1 = factor_matrix(factors, "1")
    pieces = x.unflatten(-1, (w1.shape[1], -1))
    # Products with pieces of x, because w1 ⊗ w2 has the size of the weight.
    for name in [name for name in ("lokr_w2_b", "lokr_w2_a", "lokr_w2") if name in factors]:
        pieces = F.linear(pieces, factors[name])
    return F.linear(pieces.transpose(-1, -2), w1).transpose(-1, -2).flatten(-2)


def invalid_factors_reason(factors: Mapping[str, Tensor]) -> str:
    """Return why these are not the factors of a LoHa or LoKr; "" if they are."""
    shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
    if unexpected := next((name for name in factors if not name.startswith(key_stem(factors))), ""):
        return f"{unexpected} does not belong to the other factors"
    for name in (f"{key_stem(factors)}{number}" for number in "12"):
        suffixes = [suffix for suffix in ("", "_a", "_b") if f"{name}{suffix}" in factors]
        if suffixes not in ([""], ["_a", "_b"]):
            return f"{name} is neither one matrix nor a pair of matrices"
        shapes_found = [shapes[f"{name}{suffix}"] for suffix in suffixes]
        if (
            any(len(shape) != 2 or 0 in shape for shape in shapes_found)
            or shapes_found[0][-1] != shapes_found[-1][-len(suffixes)]
        ):
            return f"shapes {', '.join(map(str, shapes_found))} do not fit {name}"
    if is_loha(factors) and _factor_shape(factors, "1") != _factor_shape(factors, "2"):
        return "w1 and w2 differ in size"
    return ""


def _factor_shape(factors: Mapping[str, Tensor], number: str) -> tuple[int, int]:
    name = f"{key_stem(factors)}{number}"
    if name in factors:
        return factors[name].shape[0], factors[name].shape[1]
    return factors[f"{name}_a"].shape[0], factors[f"{name}_b"].shape[1]
