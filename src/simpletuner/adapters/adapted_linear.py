"""Linears with a small delta: y = base(x) + strength * scale * delta x.

T tokens (batch and sequence flattened) · r rank · A (r, in) · B (out, r), float32 masters over any base
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.adapters.deltas import (
    Delta,
    LowRankDelta,
    LycorisDelta,
    factor_matrix,
    is_loha,
    multiply_factors,
)
from simpletuner.adapters.layouts import DOWN_SUFFIX, MAGNITUDE_SUFFIX, UP_SUFFIX

Dequantize = Callable[..., Tensor]


@runtime_checkable
class DequantizableLinear(Protocol):
    """A frozen linear that keeps its weight in another form."""

    def dequantizer(self) -> tuple[Dequantize, Sequence[Tensor]]:
        """Restore and parts: restore(dtype, *parts) is the weight."""


def _cast_weight(dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weight.to(dtype)


class _FrozenLinearWithDelta(torch.autograd.Function):
    """A frozen linear and its delta as one node: keeps x and A x, adds the delta in place both ways.

    given: scale, restore, parts; of two values alone dynamo would make a call without ctx.
    restore(dtype, *parts): the weight (out, in), anew each time: a copy would live until the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *given: Any
    ) -> Tensor:
        scale, restore, *parts = given
        dtype, flat = x.dtype, x.reshape(-1, x.shape[-1])
        hidden = F.linear(flat, a.to(dtype))
        y = F.linear(flat, restore(dtype, *parts), None if bias is None else bias.to(dtype))
        y.addmm_(hidden, b.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x, hidden, a, b, *parts)
        ctx.scale, ctx.restore = scale, restore
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b, *parts = ctx.saved_tensors
        grad, dtype, shape = grads[0].reshape(-1, grads[0].shape[-1]), x.dtype, x.shape
        grad_hidden, grad_a, grad_b = _factor_gradients(ctx, grad, x, hidden, a, b, first=2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            del x  # a recomputed one is gone before the largest products: 142 MB at 1024 px
            grad_x = (
                torch.mm(grad, ctx.restore(dtype, *parts))
                .addmm_(grad_hidden, a.to(dtype))
                .view(shape)
            )
        return grad_x, None, grad_a, grad_b, *([None] * (2 + len(parts)))


class _AddDelta(torch.autograd.Function):
    """base_y + scale * B A x, where the base is a module of its own kind or x went through dropout."""

    @staticmethod
    def forward(ctx: Any, base_y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        dtype = x.dtype
        hidden = F.linear(x.reshape(-1, x.shape[-1]), a.to(dtype))
        ctx.save_for_backward(x, hidden, a, b)
        ctx.scale = scale
        y = torch.addmm(base_y.reshape(-1, base_y.shape[-1]), hidden, b.to(dtype).t(), alpha=scale)
        return y.view(base_y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_hidden, grad_a, grad_b = _factor_gradients(ctx, grad, x, hidden, a, b, first=2)
        grad_x = (
            torch.mm(grad_hidden, a.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        )
        return grads[0], grad_x, grad_a, grad_b, None


def _factor_gradients(
    ctx: Any, grad: Tensor, x: Tensor, hidden: Tensor, a: Tensor, b: Tensor, first: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of A x, A and B. first: the place of A among the inputs; B follows it."""
    needs_a, needs_b = ctx.needs_input_grad[first : first + 2]
    grad_hidden = torch.mm(grad, b.to(x.dtype)).mul_(ctx.scale)
    grad_a = torch.mm(grad_hidden.t(), x.reshape(-1, x.shape[-1])).to(a.dtype) if needs_a else None
    grad_b = torch.mm(grad.t(), hidden).mul_(ctx.scale).to(b.dtype) if needs_b else None
    return grad_hidden, grad_a, grad_b


class AdaptedLinear(nn.Module, ABC):
    """A linear of any kind, frozen, and what is added to it. strength: 1 as trained, 0 the base, bit for bit.

    scale: of the delta. Dropout draws from the global generator: seed it per micro-batch, and let
    checkpointing preserve it.
    """

    def __init__(self, base_layer: nn.Module, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scale, self.strength = scale, 1.0

    @abstractmethod
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters, by PEFT's or LyCORIS' names after the module's."""

    @abstractmethod
    def to_delta(self) -> Delta:
        """At strength 1 as a file holds it, alpha folded in."""

    @abstractmethod
    def output_terms(self, columns: Tensor) -> list[Tensor]:
        """As `Factors.terms`, from the live parameters alone: what a file is compared with."""

    @property
    def magnitude(self) -> nn.Parameter | None:
        """Row norms (out,) with DoRA, else None."""
        return None

    @property
    def shape(self) -> tuple[int, int]:
        base = cast(nn.Linear, self.base_layer)
        return base.out_features, base.in_features


class LowRankLinear(AdaptedLinear, ABC):
    """down: A (r, in). up: B (out, r)."""

    def __init__(
        self,
        base_layer: nn.Module,
        down: Tensor,
        up: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base_layer, scale, dropout)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {DOWN_SUFFIX: self.down, UP_SUFFIX: self.up}

    def to_delta(self) -> LowRankDelta:
        magnitude = None if self.magnitude is None else _to_cpu_float32(self.magnitude)
        return LowRankDelta(
            _to_cpu_float32(self.down), _to_cpu_float32(self.up) * self.scale, magnitude
        )

    def output_terms(self, columns: Tensor) -> list[Tensor]:
        return [_to_cpu_float64(self.up) @ (_to_cpu_float64(self.down) @ columns) * self.scale]


class LoraLinear(LowRankLinear):
    """Plain LoRA through our autograd: base-dtype matmuls, float32 masters.

    start_down, start_up: what a delta that starts from the base's principal part is measured from
    (delta = scale * (B A - start_up start_down), so that the base is never modified); else None.
    """

    initial_down: Tensor | None
    initial_up: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        down: Tensor,
        up: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
        principal: bool = False,
    ) -> None:
        super().__init__(base_layer, down, up, scale, dropout)
        self.base_is_quantized = isinstance(base_layer, DequantizableLinear)
        self.register_buffer("initial_down", down.clone() if principal else None, persistent=False)
        self.register_buffer("initial_up", up.clone() if principal else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        base, scale = self.base_layer, self.scale * self.strength
        if self.strength == 0.0:
            return cast(Tensor, base(x))
        if self.initial_down is not None and self.initial_up is not None:
            return self._forward_from_initial(
                base(x), self.dropout(x), self.initial_down, self.initial_up
            )
        recipe = (
            None if self.training and isinstance(self.dropout, nn.Dropout) else self._dequantizer()
        )
        if recipe is not None:
            restore, parts = recipe
            return _FrozenLinearWithDelta.apply(
                _cast_for_autocast(x), base.bias, self.down, self.up, scale, restore, *parts
            )
        base_y = base(x)
        return _AddDelta.apply(base_y, self.dropout(x.to(base_y.dtype)), self.down, self.up, scale)

    def _dequantizer(self) -> tuple[Dequantize, Sequence[Tensor]] | None:
        """None where the base is no frozen linear that is known here."""
        base = self.base_layer
        if self.base_is_quantized:
            return cast(DequantizableLinear, base).dequantizer()
        return (_cast_weight, [base.weight]) if type(base) is nn.Linear else None

    def _forward_from_initial(
        self, base_y: Tensor, x: Tensor, start_down: Tensor, start_up: Tensor
    ) -> Tensor:
        """The difference of two large products is taken in the masters' dtype: bf16 would drown it."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.down.dtype)
            delta = F.linear(F.linear(x, self.down), self.up) - F.linear(
                F.linear(x, start_down), start_up
            )
        return base_y + (delta * (self.scale * self.strength)).to(base_y.dtype)

    def to_delta(self) -> LowRankDelta:
        """A start makes the rank twice as large."""
        now = super().to_delta()
        if self.initial_down is None or self.initial_up is None:
            return now
        up = torch.cat([now.up, -_to_cpu_float32(self.initial_up) * self.scale], dim=1)
        return LowRankDelta(torch.cat([now.down, _to_cpu_float32(self.initial_down)]), up)

    def output_terms(self, columns: Tensor) -> list[Tensor]:
        now = super().output_terms(columns)
        if self.initial_down is None or self.initial_up is None:
            return now
        return [
            *now,
            _to_cpu_float64(self.initial_up)
            @ (_to_cpu_float64(self.initial_down) @ columns)
            * -self.scale,
        ]


class DoraLinear(LowRankLinear):
    """DoRA (arXiv 2402.09353): rows of W + scale B A at lengths of their own.

    The length is taken as a constant in the backward pass (section 4.3 there). strength blends between the
    base's output and the adapted one.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        down: Tensor,
        up: Tensor,
        scale: float = 1.0,
        dropout: float = 0.0,
        lengths: Tensor | None = None,
    ) -> None:
        super().__init__(base_layer, down, up, scale, dropout)
        if lengths is None:
            lengths = torch.linalg.vector_norm(cast(Tensor, base_layer.weight).to(up.dtype), dim=1)
        self.row_norms = nn.Parameter(lengths)

    @property
    def magnitude(self) -> nn.Parameter:
        return self.row_norms

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {**super().adapter_parameters(), MAGNITUDE_SUFFIX: self.row_norms}

    def forward(self, x: Tensor) -> Tensor:
        base = cast(nn.Linear, self.base_layer)
        base_y = base(x)
        if self.strength == 0.0:
            return cast(Tensor, base_y)
        weight, x = base.weight.to(self.down.dtype), x.to(self.down.dtype)
        with (
            torch.no_grad(),
            torch.autocast(x.device.type, enabled=False),
        ):  # bf16 has no such lengths
            changed = torch.addmm(weight, self.up, self.down, alpha=self.scale)
            length = torch.linalg.vector_norm(changed, dim=1)
        stretch = self.row_norms / length
        if self.training and isinstance(self.dropout, nn.Dropout):
            x = self.dropout(x)
            plain = F.linear(x, weight)
        else:
            plain = base_y if base.bias is None else base_y - base.bias
        change = (stretch - 1) * plain + stretch * F.linear(
            F.linear(x, self.down), self.up
        ) * self.scale
        return cast(Tensor, base_y + (change * self.strength).to(base_y.dtype))


class LycorisLinear(AdaptedLinear):
    """LoHa and LoKr. Parts are multiplied anew at each use; of LoKr's the large product is never made."""

    def __init__(self, base_layer: nn.Module, start: LycorisDelta, dropout: float = 0.0) -> None:
        super().__init__(base_layer, start.scale, dropout)
        self.factors = nn.ParameterDict(
            {name: nn.Parameter(part) for name, part in start.factors.items()}
        )
        self.rows = start.rows

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {f".{name}": part for name, part in self.factors.items()}

    def to_delta(self) -> LycorisDelta:
        return LycorisDelta(
            {name: _to_cpu_float32(part) for name, part in self.factors.items()},
            self.scale,
            self.rows,
        )

    def output_terms(self, columns: Tensor) -> list[Tensor]:
        wide = {name: _to_cpu_float64(part) for name, part in self.factors.items()}
        return LycorisDelta(wide, self.scale, self.rows).output_terms(columns)

    def forward(self, x: Tensor) -> Tensor:
        base_y = self.base_layer(x)
        if self.strength == 0.0:
            return cast(Tensor, base_y)
        parts, x = dict(self.factors.items()), self.dropout(x.to(base_y.dtype))
        with torch.autocast(x.device.type, enabled=False):
            if is_loha(parts):
                # Kept for the backward pass are the parts, and one matrix in x's dtype.
                weight = checkpoint(
                    multiply_factors, parts, use_reentrant=False, preserve_rng_state=False
                )
                y = F.linear(x, weight.to(x.dtype))
            else:
                y = _apply_kronecker(x, {name: part.to(x.dtype) for name, part in parts.items()})
        mine = y if self.rows is None else y[..., self.rows]
        return cast(Tensor, base_y + mine * (self.scale * self.strength))


def _apply_kronecker(x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """(w1 ⊗ w2) x by w2 on pieces of x and w1 across them: (..., b d) -> (..., a c)."""
    w1 = factor_matrix(parts, "1")
    pieces = x.unflatten(-1, (w1.shape[1], -1))
    for name in [name for name in ("lokr_w2_b", "lokr_w2_a", "lokr_w2") if name in parts]:
        pieces = F.linear(pieces, parts[name])
    return F.linear(pieces.transpose(-1, -2), w1).transpose(-1, -2).flatten(-2)


def adapted_modules(transformer: nn.Module) -> dict[str, AdaptedLinear]:
    """Every adapted module by its name in the network, in module order."""
    return {
        name: part for name, part in transformer.named_modules() if isinstance(part, AdaptedLinear)
    }


def _cast_for_autocast(x: Tensor) -> Tensor:
    """What autocast would hand to the matmul; x itself outside autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _to_cpu_float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _to_cpu_float64(tensor: Tensor) -> Tensor:
    """On the CPU: MPS has no float64."""
    return tensor.detach().to("cpu").double()
