"""Linears with a low-rank delta: y = base(x) + strength * scale * B A x.

T tokens (batch and sequence flattened) · r rank · A (r, in) · B (out, r), float32 masters over any base
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from simpletuner.adapters.layouts import Factors
from simpletuner.errors import ModelError

ADAPTER = "default"
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

    restore(dtype, *parts): the weight (out, in), anew each time: a copy would live until the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, restore: Restore,
        *parts: Tensor,
    ) -> Tensor:  # fmt: skip
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


class AdaptedLinear(PeftLinear, ABC):
    """PEFT's LoRA linear, with its parameter names. strength: 1 as trained, 0 the base, bit for bit.

    Dropout draws from the global generator: seed it per micro-batch, and let checkpointing preserve it.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, adapter_name: str, **arguments: Any) -> None:
        super().__init__(base_layer, adapter_name, **arguments)
        self.strength = 1.0
        self.adopt(base_layer)

    def adopt(self, base: nn.Module) -> None:
        """Another linear of the same shape takes the base's place."""
        self.base_layer, self.restores = base, isinstance(base, Restoring)

    @property
    def down(self) -> nn.Parameter:
        """A (r, in)"""
        return cast(nn.Parameter, self.lora_A[ADAPTER].weight)

    @property
    def up(self) -> nn.Parameter:
        """B (out, r)"""
        return cast(nn.Parameter, self.lora_B[ADAPTER].weight)

    @property
    def magnitude(self) -> nn.Parameter | None:
        """Row norms (out,) with DoRA, else None."""
        parts = self.lora_magnitude_vector
        return cast(nn.Parameter, parts[ADAPTER].weight) if ADAPTER in parts else None

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank)."""
        return float(self.scaling[ADAPTER])

    def cast_adapter(self, dtype: torch.dtype) -> None:
        for part in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            part.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's. A weight restored at each use cannot take the delta in: it would be lost unnoticed."""
        if type(self.base_layer) is not nn.Linear:
            raise ModelError("a LoRA cannot be merged into quantised weights; load the base with no_change")
        super().merge(safe_merge, adapter_names)

    @abstractmethod
    def factors(self) -> Factors:
        """The delta at strength 1 as a file holds it, alpha folded in."""


class LoraLinear(AdaptedLinear):
    """Plain LoRA through our autograd: base-dtype matmuls, float32 masters.

    start_down, start_up: what a delta that starts from the base's principal part is measured from
    (delta = scale * (B A - start_up start_down), so that the base is never modified); else None.
    """

    start_down: Tensor | None
    start_up: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, **arguments: Any) -> None:
        super().__init__(base_layer, adapter_name, **arguments)
        self.register_buffer("start_down", None, persistent=False)
        self.register_buffer("start_up", None, persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if self.strength == 0.0 or self.disable_adapters or self.merged:
            return base(x, *args, **kwargs)
        dropout, scale = self.lora_dropout[ADAPTER], self.scale * self.strength
        dropping = self.training and isinstance(dropout, nn.Dropout)
        if self.start_down is not None and self.start_up is not None:
            return self._from_start(base(x, *args, **kwargs), dropout(x), self.start_down, self.start_up)
        recipe = None if dropping else self._recipe()
        if recipe is not None:
            restore, parts = recipe
            return _FrozenLinearWithDelta.apply(
                _as_autocast(x), base.bias, self.down, self.up, scale, restore, *parts
            )
        base_y = base(x, *args, **kwargs)
        return _Delta.apply(base_y, dropout(x.to(base_y.dtype)), self.down, self.up, scale)

    def _recipe(self) -> tuple[Restore, Sequence[Tensor]] | None:
        """None where the base is no frozen linear that is known here."""
        base = self.base_layer
        if self.restores:
            return cast(Restoring, base).recipe()
        return (_itself, [base.weight]) if type(base) is nn.Linear and not base.weight.requires_grad else None

    def _from_start(self, base_y: Tensor, x: Tensor, start_down: Tensor, start_up: Tensor) -> Tensor:
        """The difference of two large products is taken in the masters' dtype: bf16 would drown it."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.down.dtype)
            delta = F.linear(F.linear(x, self.down), self.up) - F.linear(F.linear(x, start_down), start_up)
        return base_y + (delta * (self.scale * self.strength)).to(base_y.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """(out, in) at strength 1; PEFT's merge uses it."""
        delta = self.up @ self.down
        if self.start_down is not None and self.start_up is not None:
            delta = delta - self.start_up @ self.start_down
        return delta * self.scale

    def factors(self) -> Factors:
        """A start makes the rank twice as large."""
        down, up = _on_cpu(self.down), _on_cpu(self.up)
        if self.start_down is not None and self.start_up is not None:
            down = torch.cat([down, _on_cpu(self.start_down)])
            up = torch.cat([up, -_on_cpu(self.start_up)], dim=1)
        return Factors(down, up * self.scale)


class DoraLinear(AdaptedLinear):
    """PEFT's DoRA (arXiv 2402.09353); strength blends between the base's output and the adapted one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.strength == 1.0:
            return super().forward(x, *args, **kwargs)
        base_y = self.base_layer(x, *args, **kwargs)
        if self.strength == 0.0:
            return base_y
        return torch.lerp(base_y, super().forward(x, *args, **kwargs), self.strength)

    def factors(self) -> Factors:
        magnitude = None if self.magnitude is None else _on_cpu(self.magnitude)
        return Factors(_on_cpu(self.down), _on_cpu(self.up) * self.scale, magnitude)


def adapted(transformer: nn.Module) -> dict[str, AdaptedLinear]:
    """Every adapted module by its name in the network, in module order."""
    return {name: part for name, part in transformer.named_modules() if isinstance(part, AdaptedLinear)}


def _as_autocast(x: Tensor) -> Tensor:
    """What autocast would hand to the matmul; x itself outside autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
