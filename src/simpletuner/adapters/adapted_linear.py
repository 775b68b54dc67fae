"""Linears with a low-rank or LyCORIS delta: y = base(x) + strength * scale * delta x.

T tokens (batch and sequence flattened) · r rank · A (r, in) · B (out, r)
Trained parameters are float32 masters over a base of any dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.adapters.deltas import (
    Delta,
    LowRankDelta,
    LycorisDelta,
    apply_kronecker,
    is_loha,
    multiply_factors,
)
from simpletuner.adapters.layouts import DOWN_SUFFIX, UP_SUFFIX

Dequantize = Callable[..., Tensor]


@runtime_checkable
class DequantizableLinear(Protocol):
    """A frozen linear that stores its weight in another form."""

    def dequantizer(self) -> tuple[Dequantize, Sequence[Tensor]]:
        """Return (dequantize, buffers); dequantize(dtype, *buffers) is the weight (out, in)."""


def _cast_weight(dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weight.to(dtype)


class _FrozenLinearWithDelta(torch.autograd.Function):
    """A frozen linear and its delta as one autograd node, which saves only x and A x.

    given: scale, copies of A and B in the dtype of x or None twice, output_unused (see LoraLinear),
    dequantize and its buffers. They are one variadic argument because dynamo drops ctx from a node
    with exactly two other inputs. dequantize builds the weight (out, in) again in the backward
    pass: a saved copy would occupy memory until then.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *given: Any
    ) -> Tensor:
        scale, a_copy, b_copy, output_unused, dequantize, *buffers = given
        ctx.master_dtype = a.dtype
        a, b = (a, b) if a_copy is None else (a_copy, b_copy)
        dtype, flat = x.dtype, x.reshape(-1, x.shape[-1])
        hidden = F.linear(flat, a.to(dtype))
        ctx.save_for_backward(x, hidden, a, b, *buffers)
        ctx.scale = scale
        ctx.dequantize = dequantize
        if output_unused:
            # Its values are not used: one element, seen in the shape of the output.
            return x.new_empty(1).expand(*x.shape[:-1], len(b))
        y = F.linear(flat, dequantize(dtype, *buffers), None if bias is None else bias.to(dtype))
        # In place, with the scale inside the product: no second tensor of the size of y.
        y.addmm_(hidden, b.to(dtype).t(), alpha=scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b, *buffers = ctx.saved_tensors
        grad, dtype, shape = grads[0].reshape(-1, grads[0].shape[-1]), x.dtype, x.shape
        grad_hidden, grad_a, grad_b = _factor_gradients(ctx, grad, x, hidden, a, b, first=2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            del x  # frees a checkpointed input before the largest products: 142 MB at 1024 px
            grad_x = (
                torch.mm(grad, ctx.dequantize(dtype, *buffers))
                .addmm_(grad_hidden, a.to(dtype))
                .view(shape)
            )
        return grad_x, None, grad_a, grad_b, *([None] * (5 + len(buffers)))


class _AddDelta(torch.autograd.Function):
    """base_y + scale * B A x, for a base that is not a plain linear, or x after dropout.

    given: scale, and copies of A and B in the dtype of x or None twice.
    """

    @staticmethod
    def forward(ctx: Any, base_y: Tensor, x: Tensor, a: Tensor, b: Tensor, *given: Any) -> Tensor:
        scale, a_copy, b_copy = given
        ctx.master_dtype = a.dtype
        a, b = (a, b) if a_copy is None else (a_copy, b_copy)
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
        return grads[0], grad_x, grad_a, grad_b, None, None, None


def _factor_gradients(
    ctx: Any, grad: Tensor, x: Tensor, hidden: Tensor, a: Tensor, b: Tensor, first: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of A x, A and B. first: position of A among the inputs; B follows."""
    needs_a, needs_b = ctx.needs_input_grad[first : first + 2]
    grad_hidden = _scale(torch.mm(grad, b.to(x.dtype)), ctx.scale)
    grad_a = grad_b = None
    if needs_a:
        grad_a = torch.mm(grad_hidden.t(), x.reshape(-1, x.shape[-1])).to(ctx.master_dtype)
    if needs_b:
        grad_b = _scale(torch.mm(grad.t(), hidden), ctx.scale).to(ctx.master_dtype)
    return grad_hidden, grad_a, grad_b


def _scale(product: Tensor, scale: float) -> Tensor:
    """Multiply in place; a scale of 1, as with alpha = rank, costs no operation."""
    return product if scale == 1.0 else product.mul_(scale)


class AdaptedLinear(nn.Module, ABC):
    """A frozen linear of any kind plus a delta. strength: 1 as trained, 0 exactly the base.

    scale: factor of the delta. Dropout uses the global random generator: seed it per micro-batch,
    and let gradient checkpointing preserve its state.
    """

    def __init__(self, base_layer: nn.Module, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scale = scale
        self.strength = 1.0

    @abstractmethod
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by PEFT's or LyCORIS' key suffixes."""

    @abstractmethod
    def to_delta(self) -> Delta:
        """Return the delta at strength 1 as a file holds it, with alpha folded in."""

    @abstractmethod
    def output_terms(self, columns: Tensor) -> list[Tensor]:
        """Return the terms whose sum is delta W @ columns, from the live parameters in float64.

        A saved file is compared with them.
        """

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's row norms (out,), or None."""
        return None

    @property
    def shape(self) -> tuple[int, int]:
        base = cast(nn.Linear, self.base_layer)
        return base.out_features, base.in_features


class LowRankLinear(AdaptedLinear, ABC):
    """An adapted linear with factors down: A (r, in) and up: B (out, r)."""

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


@dataclass
class CopyActivity:
    """A switch of all modules of a network: whether copies equal the trained factors now."""

    active: bool = False


@dataclass(frozen=True)
class FactorCopies:
    """A and B of a module in the dtype of its products; factor_copies.py keeps them current."""

    activity: CopyActivity
    down: Tensor
    up: Tensor


class LoraLinear(LowRankLinear):
    """LoRA with matmuls in the base's dtype and float32 master weights.

    output_unused: set while a block is computed again for its backward pass; no output is computed.
    initial_down, initial_up: set for initializations taken from the base's principal components
    (PiSSA, OLoRA), else None. The delta is then scale * (B A - initial_up initial_down), so that
    the base is never modified.
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
        self.output_unused = False
        self.base_is_quantized = isinstance(base_layer, DequantizableLinear)
        self.factor_copies: FactorCopies | None = None
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
        # With dropout the delta sees another x than the base: they are not one node then.
        dequantizer = (
            None if self.training and isinstance(self.dropout, nn.Dropout) else self._dequantizer()
        )
        if dequantizer is not None:
            dequantize, buffers = dequantizer
            x = _cast_for_autocast(x)
            result = _FrozenLinearWithDelta.apply(  # type: ignore[no-untyped-call]
                x,
                base.bias,
                self.down,
                self.up,
                scale,
                *self._current_copies(x.dtype),
                self.output_unused,
                dequantize,
                *buffers,
            )
            return cast(Tensor, result)
        base_y = base(x)
        copies = self._current_copies(base_y.dtype)
        result = _AddDelta.apply(  # type: ignore[no-untyped-call]
            base_y, self.dropout(x.to(base_y.dtype)), self.down, self.up, scale, *copies
        )
        return cast(Tensor, result)

    def _current_copies(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return A and B in this dtype where a step has copied them, else None twice."""
        copies = self.factor_copies
        if copies is None or not copies.activity.active or copies.down.dtype != dtype:
            return None, None
        return copies.down, copies.up

    def _dequantizer(self) -> tuple[Dequantize, Sequence[Tensor]] | None:
        """Return how the weight is restored; None if the base is not a known frozen linear."""
        base = self.base_layer
        if self.base_is_quantized:
            return cast(DequantizableLinear, base).dequantizer()
        return (_cast_weight, [base.weight]) if type(base) is nn.Linear else None

    def _forward_from_initial(
        self, base_y: Tensor, x: Tensor, initial_down: Tensor, initial_up: Tensor
    ) -> Tensor:
        """Return base_y + scale * (B A - B0 A0) x as (B - B0) A x + B0 (A - A0) x.

        Factors are subtracted before any product: the products of TF32 would lose the difference
        of two large deltas (15 % of it after a first step of 1e-4).
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.down.dtype)
            delta = F.linear(F.linear(x, self.down), self.up - initial_up) + F.linear(
                F.linear(x, self.down - initial_down), initial_up
            )
        return base_y + (delta * (self.scale * self.strength)).to(base_y.dtype)

    def to_delta(self) -> LowRankDelta:
        """Return the delta; with initial factors its rank is twice as large."""
        current = super().to_delta()
        if self.initial_down is None or self.initial_up is None:
            return current
        up = torch.cat([current.up, -_to_cpu_float32(self.initial_up) * self.scale], dim=1)
        return LowRankDelta(torch.cat([current.down, _to_cpu_float32(self.initial_down)]), up)

    def output_terms(self, columns: Tensor) -> list[Tensor]:
        current = super().output_terms(columns)
        if self.initial_down is None or self.initial_up is None:
            return current
        return [
            *current,
            _to_cpu_float64(self.initial_up)
            @ (_to_cpu_float64(self.initial_down) @ columns)
            * -self.scale,
        ]


class LycorisLinear(AdaptedLinear):
    """LoHa and LoKr. Factors are multiplied at each use; LoKr's full product is never built."""

    def __init__(self, base_layer: nn.Module, initial: LycorisDelta, dropout: float = 0.0) -> None:
        super().__init__(base_layer, initial.scale, dropout)
        self.factors = nn.ParameterDict(
            {name: nn.Parameter(part) for name, part in initial.factors.items()}
        )
        self.rows = initial.rows

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {f".{name}": factor for name, factor in self.factors.items()}

    def to_delta(self) -> LycorisDelta:
        return LycorisDelta(
            {name: _to_cpu_float32(factor) for name, factor in self.factors.items()},
            self.scale,
            self.rows,
        )

    def output_terms(self, columns: Tensor) -> list[Tensor]:
        factors = {name: _to_cpu_float64(factor) for name, factor in self.factors.items()}
        return LycorisDelta(factors, self.scale, self.rows).output_terms(columns)

    def forward(self, x: Tensor) -> Tensor:
        base_y = self.base_layer(x)
        if self.strength == 0.0:
            return cast(Tensor, base_y)
        factors, x = dict(self.factors.items()), self.dropout(x.to(base_y.dtype))
        with torch.autocast(x.device.type, enabled=False):
            if is_loha(factors):
                # The backward pass keeps only the factors and one matrix in x's dtype.
                weight = checkpoint(
                    multiply_factors, factors, use_reentrant=False, preserve_rng_state=False
                )
                y = F.linear(x, weight.to(x.dtype))
            else:
                y = apply_kronecker(
                    x, {name: factor.to(x.dtype) for name, factor in factors.items()}
                )
        selected = y if self.rows is None else y[..., self.rows]
        return cast(Tensor, base_y + selected * (self.scale * self.strength))


def adapted_modules(transformer: nn.Module) -> dict[str, AdaptedLinear]:
    """Return every adapted module by its name in the network, in module order."""
    return {
        name: part for name, part in transformer.named_modules() if isinstance(part, AdaptedLinear)
    }


def _cast_for_autocast(x: Tensor) -> Tensor:
    """Cast x to the dtype that autocast would give the matmul; unchanged outside autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _to_cpu_float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _to_cpu_float64(tensor: Tensor) -> Tensor:
    """Return a float64 copy on the CPU, because MPS has no float64."""
    return tensor.detach().to("cpu").double()
