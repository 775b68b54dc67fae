"""The linear of a DoRA: a low-rank delta, and trained norms of the rows or columns it gives."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.adapters.adapted_linear import LowRankLinear
from simpletuner.adapters.layouts import DORA_SCALE_SUFFIX, MAGNITUDE_SUFFIX


class DoraLinear(LowRankLinear):
    """DoRA (arXiv 2402.09353): the rows of W + scale B A, rescaled to trained norms.

    The norm of each row is a constant in the backward pass (section 4.3 of the paper). strength
    interpolates between the base's output and the adapted one. row_norms: (out,), by default the
    norms of the rows of W; of the shape (1, in) they are norms of the columns, as in files of
    OneTrainer.
    """

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
        if row_norms is None:
            row_norms = torch.linalg.vector_norm(
                cast(Tensor, base_layer.weight).to(up.dtype), dim=1
            )
        self.row_norms = nn.Parameter(row_norms)

    @property
    def magnitude(self) -> nn.Parameter:
        return self.row_norms

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        suffix = MAGNITUDE_SUFFIX if self.row_norms.ndim == 1 else DORA_SCALE_SUFFIX
        return {**super().adapter_parameters(), suffix: self.row_norms}

    def forward(self, x: Tensor) -> Tensor:
        base = cast(nn.Linear, self.base_layer)
        base_y = base(x)
        if self.strength == 0.0:
            return cast(Tensor, base_y)
        if self.row_norms.ndim == 2:
            return self._forward_per_input(base, base_y, x)
        weight, x = base.weight.to(self.down.dtype), x.to(self.down.dtype)
        # Without autocast, because bf16 is too coarse for norms.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            adapted = torch.addmm(weight, self.up, self.down, alpha=self.scale)
            norms = torch.linalg.vector_norm(adapted, dim=1)
        ratio = self.row_norms / norms
        if self.training and isinstance(self.dropout, nn.Dropout):
            x = self.dropout(x)
            base_product = F.linear(x, weight)
        else:
            base_product = base_y if base.bias is None else base_y - base.bias
        change = (ratio - 1) * base_product + ratio * F.linear(
            F.linear(x, self.down), self.up
        ) * self.scale
        return cast(Tensor, base_y + (change * self.strength).to(base_y.dtype))

    def _forward_per_input(self, base: nn.Linear, base_y: Tensor, x: Tensor) -> Tensor:
        """Rescale the columns of W + scale B A, which is the same as rescaling x."""
        weight, x = base.weight.to(self.down.dtype), x.to(self.down.dtype)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            adapted = torch.addmm(weight, self.up, self.down, alpha=self.scale)
            norms = torch.linalg.vector_norm(adapted, dim=0, keepdim=True)
        rescaled = self.dropout(x) * (self.row_norms / norms)
        y = (
            F.linear(rescaled, weight)
            + F.linear(F.linear(rescaled, self.down), self.up) * self.scale
        )
        base_product = base_y if base.bias is None else base_y - base.bias
        return base_y + ((y - base_product) * self.strength).to(base_y.dtype)
