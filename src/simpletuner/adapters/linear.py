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

from simpletuner.adapters.deltas import Delta, Factors, Product, half, is_loha, product
from simpletuner.adapters.layouts import DOWN, MAGNITUDE, UP

Restore = Callable[..., Tensor]


@runtime_checkable
class Restoring(Protocol):
    """A frozen linear that keeps its weight in another form."""

    def recipe(self) -> tuple[Restore, Sequence[Tensor]]:
        """restore and parts: restore(dtype, *parts) is the weight."""


def _itself(dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weight.to(dtype)


class _FrozenLinearWithDelta(torch.autograd.Function):
    """A frozen linear and its delta as one node: keeps x and A x, adds the delta in place both ways.

    given: scale, restore, parts; of two values alone dynamo would make a call without ctx.
    restore(dtype, *parts): the weight (out, in), anew each time: a copy would live until the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *given: Any) -> Tensor:
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
            grad_x = torch.mm(grad, ctx.restore(dtype, *parts)).addmm_(grad_hidden, a.to(dtype)).view(shape)
        return grad_x, None, grad_a, grad_b, *([None] * (2 + len(parts)))


class _Delta(torch.autograd.Function):
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
        grad_x = torch.mm(grad_hidden, a.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
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
    def named(self) -> dict[str, nn.Parameter]:
        """The parameters, by PEFT's or LyCORIS' names after the module's."""

    @abstractmethod
    def delta(self) -> Delta:
        """At strength 1 as a file holds it, alpha folded in."""

    @abstractmethod
    def terms(self, columns: Tensor) -> list[Tensor]:
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
        self, base_layer: nn.Module, down: Tensor, up: Tensor, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__(base_layer, scale, dropout)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def named(self) -> dict[str, nn.Parameter]:
        return {DOWN: self.down, UP: self.up}

    def delta(self) -> Factors:
        magnitude = None if self.magnitude is None else _on_cpu(self.magnitude)
        return Factors(_on_cpu(self.down), _on_cpu(self.up) * self.scale, magnitude)

    def terms(self, columns: Tensor) -> list[Tensor]:
        return [_wide(self.up) @ (_wide(self.down) @ columns) * self.scale]


class LoraLinear(LowRankLinear):
    """Plain LoRA through our autograd: base-dtype matmuls, float32 masters.

    start_down, start_up: what a delta that starts from the base's principal part is measured from
    (delta = scale * (B A - start_up start_down), so that the base is never modified); else None.
    """

    start_down: Tensor | None
    start_up: Tensor | None

    def __init__(
        self, base_layer: nn.Module, down: Tensor, up: Tensor, scale: float = 1.0, dropout: float = 0.0,
        principal: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(base_layer, down, up, scale, dropout)
        self.restores = isinstance(base_layer, Restoring)
        self.register_buffer("start_down", down.clone() if principal else None, persistent=False)
        self.register_buffer("start_up", up.clone() if principal else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        base, scale = self.base_layer, self.scale * self.strength
        if self.strength == 0.0:
            return cast(Tensor, base(x))
        if self.start_down is not None and self.start_up is not None:
            return self._from_start(base(x), self.dropout(x), self.start_down, self.start_up)
        recipe = None if self.training and isinstance(self.dropout, nn.Dropout) else self._recipe()
        if recipe is not None:
            restore, parts = recipe
            return _FrozenLinearWithDelta.apply(
                _as_autocast(x), base.bias, self.down, self.up, scale, restore, *parts
            )
        base_y = base(x)
        return _Delta.apply(base_y, self.dropout(x.to(base_y.dtype)), self.down, self.up, scale)

    def _recipe(self) -> tuple[Restore, Sequence[Tensor]] | None:
        """None where the base is no frozen linear that is known here."""
        base = self.base_layer
        if self.restores:
            return cast(Restoring, base).recipe()
        return (_itself, [base.weight]) if type(base) is nn.Linear else None

    def _from_start(self, base_y: Tensor, x: Tensor, start_down: Tensor, start_up: Tensor) -> Tensor:
        """The difference of two large products is taken in the masters' dtype: bf16 would drown it."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.down.dtype)
            delta = F.linear(F.linear(x, self.down), self.up) - F.linear(F.linear(x, start_down), start_up)
        return base_y + (delta * (self.scale * self.strength)).to(base_y.dtype)

    def delta(self) -> Factors:
        """A start makes the rank twice as large."""
        now = super().delta()
        if self.start_down is None or self.start_up is None:
            return now
        up = torch.cat([now.up, -_on_cpu(self.start_up) * self.scale], dim=1)
        return Factors(torch.cat([now.down, _on_cpu(self.start_down)]), up)

    def terms(self, columns: Tensor) -> list[Tensor]:
        now = super().terms(columns)
        if self.start_down is None or self.start_up is None:
            return now
        return [*now, _wide(self.start_up) @ (_wide(self.start_down) @ columns) * -self.scale]


class DoraLinear(LowRankLinear):
    """DoRA (arXiv 2402.09353): rows of W + scale B A at lengths of their own.

    The length is taken as a constant in the backward pass (section 4.3 there). strength blends between the
    base's output and the adapted one.
    """

    def __init__(
        self, base_layer: nn.Module, down: Tensor, up: Tensor, scale: float = 1.0, dropout: float = 0.0,
        lengths: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(base_layer, down, up, scale, dropout)
        if lengths is None:
            lengths = torch.linalg.vector_norm(cast(Tensor, base_layer.weight).to(up.dtype), dim=1)
        self.lengths = nn.Parameter(lengths)

    @property
    def magnitude(self) -> nn.Parameter:
        return self.lengths

    def named(self) -> dict[str, nn.Parameter]:
        return {**super().named(), MAGNITUDE: self.lengths}

    def forward(self, x: Tensor) -> Tensor:
        base = cast(nn.Linear, self.base_layer)
        base_y = base(x)
        if self.strength == 0.0:
            return cast(Tensor, base_y)
        weight, x = base.weight.to(self.down.dtype), x.to(self.down.dtype)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # bf16 has no such lengths
            changed = torch.addmm(weight, self.up, self.down, alpha=self.scale)
            length = torch.linalg.vector_norm(changed, dim=1)
        stretch = self.lengths / length
        if self.training and isinstance(self.dropout, nn.Dropout):
            x = self.dropout(x)
            plain = F.linear(x, weight)
        else:
            plain = base_y if base.bias is None else base_y - base.bias
        change = (stretch - 1) * plain + stretch * F.linear(F.linear(x, self.down), self.up) * self.scale
        return cast(Tensor, base_y + (change * self.strength).to(base_y.dtype))


class ProductLinear(AdaptedLinear):
    """LoHa and LoKr. Parts are multiplied anew at each use; of LoKr's the large product is never made."""

    def __init__(self, base_layer: nn.Module, start: Product, dropout: float = 0.0) -> None:
        super().__init__(base_layer, start.scale, dropout)
        self.parts = nn.ParameterDict({name: nn.Parameter(part) for name, part in start.parts.items()})
        self.rows = start.rows

    def named(self) -> dict[str, nn.Parameter]:
        return {f".{name}": part for name, part in self.parts.items()}

    def delta(self) -> Product:
        return Product({name: _on_cpu(part) for name, part in self.parts.items()}, self.scale, self.rows)

    def terms(self, columns: Tensor) -> list[Tensor]:
        wide = {name: _wide(part) for name, part in self.parts.items()}
        return Product(wide, self.scale, self.rows).terms(columns)

    def forward(self, x: Tensor) -> Tensor:
        base_y = self.base_layer(x)
        if self.strength == 0.0:
            return cast(Tensor, base_y)
        parts, x = dict(self.parts.items()), self.dropout(x.to(base_y.dtype))
        with torch.autocast(x.device.type, enabled=False):
            if is_loha(parts):
                # Kept for the backward pass are the parts, and one matrix in x's dtype.
                weight = checkpoint(product, parts, use_reentrant=False, preserve_rng_state=False)
                y = F.linear(x, weight.to(x.dtype))
            else:
                y = _kronecker(x, {name: part.to(x.dtype) for name, part in parts.items()})
        mine = y if self.rows is None else y[..., self.rows]
        return cast(Tensor, base_y + mine * (self.scale * self.strength))


def _kronecker(x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """(w1 ⊗ w2) x by w2 on pieces of x and w1 across them: (..., b d) -> (..., a c)."""
    w1 = half(parts, "1")
    pieces = x.unflatten(-1, (w1.shape[1], -1))
    for name in [name for name in ("lokr_w2_b", "lokr_w2_a", "lokr_w2") if name in parts]:
        pieces = F.linear(pieces, parts[name])
    return F.linear(pieces.transpose(-1, -2), w1).transpose(-1, -2).flatten(-2)


def adapted(transformer: nn.Module) -> dict[str, AdaptedLinear]:
    """Every adapted module by its name in the network, in module order."""
    return {name: part for name, part in transformer.named_modules() if isinstance(part, AdaptedLinear)}


def _as_autocast(x: Tensor) -> Tensor:
    """What autocast would hand to the matmul; x itself outside autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _wide(tensor: Tensor) -> Tensor:
    """On the CPU: MPS has no float64."""
    return tensor.detach().to("cpu").double()
