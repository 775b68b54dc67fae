"""The linear of a DoRA: a low-rank delta, and trained norms of the rows or columns it gives."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.adapters.adapted_linear import LowRankLinear
from simpletuner.adapters.layouts import DORA_SCALE_SUFFIX, MAGNITUDE_SUFFIX

# Rows of a weight that are cast to float32 at a time for the norms.
ROWS_AT_ONCE = 1024


class DoraLinear(LowRankLinear):
    """DoRA (arXiv 2402.09353): the rows of W + scale B A, rescaled to trained norms.

    The norm of each row is a constant in the backward pass (section 4.3 of the paper). strength
    interpolates between the base's output and the adapted one. row_norms: (out,), by default the
    norms of the rows of W; of the shape (1, in) they are norms of the columns, as in files of
    OneTrainer.

    The adapted weight is never built. With s = scale, the square of a row's norm is
    ||W||^2 + 2 s (W A^T . B) + s^2 (B (A A^T) . B), where . sums the products of a row; that of a
    column is the same with W^T, A^T and B^T. The first term is computed once.
    """

    base_squares: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        down: Tensor,
        up: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
        row_norms: Tensor | None = None,
    ) -> None:
        super().__init__(base_layer, down, up, scale, dropout)
        by_column = row_norms is not None and row_norms.ndim == 2
        squares = self._squares_of_base(by_column)
        self.register_buffer("base_squares", squares, persistent=False)
        self.row_norms = nn.Parameter(squares.sqrt() if row_norms is None else row_norms)

    @torch.no_grad()
    def _squares_of_base(self, by_column: bool) -> Tensor:
        """Return the squared norms of the rows of W, (out,), or of its columns, (1, in)."""
        weight, dtype = cast(Tensor, self.base_layer.weight), self.up.dtype
        sums = [
            rows.to(dtype).square().sum(0 if by_column else 1)
            for rows in weight.split(ROWS_AT_ONCE)
        ]
        return torch.stack(sums).sum(0)[None] if by_column else torch.cat(sums)

    @property
    def magnitude(self) -> nn.Parameter:
        return self.row_norms

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        suffix = MAGNITUDE_SUFFIX if self.row_norms.ndim == 1 else DORA_SCALE_SUFFIX
        return {**super().adapter_parameters(), suffix: self.row_norms}

    @torch.no_grad()
    def adapted_norms(self) -> Tensor:
        """Return the norms of the rows, (out,), or columns, (1, in), of W + scale B A."""
        down, up, scale = self.down, self.up, self.scale
        weight = cast(Tensor, self.base_layer.weight)
        # Without autocast, because bf16 is too coarse for norms.
        with torch.autocast(down.device.type, enabled=False):
            pairs = zip(weight.split(ROWS_AT_ONCE), up.split(ROWS_AT_ONCE), strict=True)
            if self.row_norms.ndim == 1:
                crossed = torch.cat(
                    [(rows.to(up.dtype) @ down.t()).mul_(part).sum(1) for rows, part in pairs]
                )
                squared = (up @ (down @ down.t())).mul_(up).sum(1)
            else:
                products = [part.t() @ rows.to(up.dtype) for rows, part in pairs]
                crossed = (torch.stack(products).sum(0) * down).sum(0, keepdim=True)
                squared = ((up.t() @ up) @ down).mul_(down).sum(0, keepdim=True)
            # Rounding may make the sum negative where B A cancels W.
            squares = self.base_squares + 2 * scale * crossed + scale**2 * squared
            return squares.clamp_min_(torch.finfo(squares.dtype).tiny).sqrt_()

    def forward(self, x: Tensor) -> Tensor:
        base_y = cast(Tensor, self.base_layer(x))
        if self.strength == 0.0:
            return base_y
        # The norms have no gradient, so the ratio trains row_norms alone.
        ratio = self.row_norms / self.adapted_norms()
        if self.row_norms.ndim == 2:
            return self._forward_per_input(base_y, x, ratio)
        if self.training and isinstance(self.dropout, nn.Dropout):
            x = self.dropout(x)
            # Dropout applies to W + scale B A as a whole, so W needs the dropped x too.
            base_product = self._without_bias(self.base_layer(x))
        else:
            base_product = self._without_bias(base_y)
        change = (ratio - 1) * base_product + ratio * self._low_rank_product(x)
        return base_y + (change * self.strength).to(base_y.dtype)

    def _forward_per_input(self, base_y: Tensor, x: Tensor, ratio: Tensor) -> Tensor:
        """Rescale the columns of W + scale B A, which is the same as rescaling x."""
        rescaled = self.dropout(x.to(self.down.dtype)) * ratio
        y = self._without_bias(self.base_layer(rescaled.to(x.dtype)))
        change = y + self._low_rank_product(rescaled) - self._without_bias(base_y)
        return base_y + (change * self.strength).to(base_y.dtype)

    def _low_rank_product(self, x: Tensor) -> Tensor:
        """Return scale * B A x in the dtype of the factors, or of autocast."""
        x = x.to(self.down.dtype)
        return F.linear(F.linear(x, self.down), self.up) * self.scale

    def _without_bias(self, y: Tensor) -> Tensor:
        bias = cast(nn.Linear, self.base_layer).bias
        return y if bias is None else y - bias
