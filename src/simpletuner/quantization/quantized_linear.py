"""A frozen linear that holds its weight in a scheme's parts and restores it whenever it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.quantization.schemes import SCHEMES, get_scheme

Dequantize = Callable[..., Tensor]


class _QuantizedLinearFunction(torch.autograd.Function):
    """x W^T + bias. Neither x nor the restored weight is kept: the backward restores it again.

    given: bias, restore, parts; of two values alone dynamo would make a call without ctx.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        bias, restore, *parts = given
        ctx.save_for_backward(*parts)
        ctx.restore, ctx.dtype = restore, x.dtype
        return F.linear(x, restore(x.dtype, *parts), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        parts = ctx.saved_tensors  # once: under checkpointing a second look is refused
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            flat = torch.mm(grad, ctx.restore(ctx.dtype, *parts))
            grad_x = flat.view(*grads[0].shape[:-1], flat.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(0)
        return grad_x, grad_bias, *([None] * (1 + len(parts)))


def _dequantize(scheme: str, columns: int, dtype: torch.dtype, *parts: Tensor) -> Tensor:
    table = SCHEMES[scheme]
    return table.dequantize(
        dict(zip(table.buffer_shapes(1, columns), parts, strict=True)), columns, dtype
    )


class QuantizedLinear(nn.Linear):
    """nn.Linear for those who look (PEFT does), with the scheme's parts as buffers instead of a weight.

    Gradients are bit for bit those of an nn.Linear that holds the restored weight. `weight` is a fresh copy
    at each use, in `weight_dtype`: writing to it changes nothing. Moving to another dtype changes
    weight_dtype and the bias, never the parts. Equal parts on another device may take their place.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: str,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.weight_dtype = get_scheme(scheme).name, dtype
        for name, (shape, kind) in self.buffer_shapes().items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        value = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter(
            "bias", None if value is None else nn.Parameter(value, requires_grad=False)
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: str) -> QuantizedLinear:
        """The same linear quantised, where it lies; on the meta device only its shapes."""
        weight, bias = linear.weight.detach(), linear.bias
        made = cls(
            linear.in_features,
            linear.out_features,
            scheme,
            bias=bias is not None,
            dtype=weight.dtype,
            device=weight.device,
        )
        if not weight.is_meta:
            for name, part in get_scheme(scheme).quantize(weight).items():
                made._buffers[name] = part
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return made.train(linear.training)

    def buffer_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of the buffers, in the scheme's order."""
        return dict(SCHEMES[self.scheme].buffer_shapes(self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in) in weight_dtype"""
        restore, parts = self.dequantizer()
        return restore(self.weight_dtype, *parts)

    def dequantizer(self) -> tuple[Dequantize, list[Tensor]]:
        """restore(dtype, *parts): the weight. For those who have it in a node of their own (adapters)."""
        return partial(_dequantize, self.scheme, self.in_features), self._scheme_buffers()

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        restore, parts = self.dequantizer()
        return _QuantizedLinearFunction.apply(input, self._bias_as(input.dtype), restore, *parts)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"

    def _bias_as(self, dtype: torch.dtype) -> Tensor | None:
        bias = self._parameters["bias"]
        return None if bias is None else bias.to(dtype)

    def _scheme_buffers(self) -> list[Tensor]:
        return [self.get_buffer(name) for name in SCHEMES[self.scheme].buffer_shapes(1, 1)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        kept = dict(zip(self.buffer_shapes(), self._scheme_buffers(), strict=True))
        super()._apply(fn, recurse)
        for name, part in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != part.dtype:  # .to(dtype), .half(): a part of another dtype is no part
                self._buffers[name] = part.to(moved.device)
        self.weight_dtype = fn(
            torch.empty(0, dtype=self.weight_dtype, device=self._scheme_buffers()[0].device)
        ).dtype
        return self


def quantize_modules(
    network: nn.Module,
    names: Iterable[str],
    scheme: str,
    kind: type[QuantizedLinear] = QuantizedLinear,
) -> None:
    """Replace these linears of a network in place, one after the other."""
    for name in names:
        parent, _, own = name.rpartition(".")
        linear = network.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is no linear: {type(linear).__name__}")
        setattr(network.get_submodule(parent), own, kind.from_linear(linear, scheme))
