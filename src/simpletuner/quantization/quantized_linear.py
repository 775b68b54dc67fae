"""A frozen linear that stores its weight quantized and dequantizes it whenever it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.quantization.schemes import SCHEMES, get_scheme

Dequantize = Callable[..., Tensor]


class _QuantizedLinearFunction(torch.autograd.Function):
    """x W^T + bias. Neither x nor the weight is saved; the backward pass dequantizes again.

    given: bias, unused_columns, dequantize and its buffers. They are one variadic argument because
    dynamo drops ctx from a node with exactly two inputs. unused_columns: None, or the width of an
    output that is not read; it then has no values.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        bias, unused_columns, dequantize, *buffers = given
        ctx.save_for_backward(*buffers)
        ctx.dequantize = dequantize
        ctx.dtype = x.dtype
        if unused_columns is not None:
            # Its values are not used: one element, seen in the shape of the output.
            return x.new_empty(1).expand(*x.shape[:-1], unused_columns)
        return F.linear(x, dequantize(x.dtype, *buffers), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        buffers = ctx.saved_tensors  # read only once: gradient checkpointing refuses a second read
        grad_x = None
        grad_bias = None
        if ctx.needs_input_grad[0]:
            flat = torch.mm(grad, ctx.dequantize(ctx.dtype, *buffers))
            grad_x = flat.view(*grads[0].shape[:-1], flat.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(0)
        return grad_x, grad_bias, *([None] * (2 + len(buffers)))


def _dequantize(scheme: str, columns: int, dtype: torch.dtype, *buffers: Tensor) -> Tensor:
    table = SCHEMES[scheme]
    return table.dequantize(
        dict(zip(table.buffer_shapes(1, columns), buffers, strict=True)), columns, dtype
    )


@cache
def _compiled_dequantize(scheme: str) -> Dequantize:
    """Return the scheme's dequantize in one program for matrices of any size; bits are the same."""
    compiled: Dequantize = torch.compile(partial(_dequantize, scheme), dynamic=True)
    return compiled


class QuantizedLinear(nn.Linear):
    """An nn.Linear (PEFT checks for that type) with a scheme's buffers instead of a weight.

    The buffers are frozen parameters, also those of integers, because FSDP2 shards parameters only.
    The gradients are bit for bit those of an nn.Linear that holds the dequantized weight. `weight`
    is a new tensor at each access, in `weight_dtype`, so writing to it has no effect. Conversion to
    another dtype changes weight_dtype and the bias, never the buffers.

    output_unused: set while a block is computed again only for its backward pass; the output of its
    last linear is then not computed. compiles_dequantize: restore the weight in a program of
    torch.compile, which reads the codes and writes the weight in one pass.
    """

    output_unused = False
    compiles_dequantize = False

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
        # Not nn.Linear's own, which would allocate the weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.weight_dtype = get_scheme(scheme).name, dtype
        for name, (shape, kind) in self.buffer_shapes().items():
            self._set_buffer(name, torch.empty(shape, dtype=kind, device=device))
        value = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter(
            "bias", None if value is None else nn.Parameter(value, requires_grad=False)
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: str) -> QuantizedLinear:
        """Quantize a linear on its device; on the meta device only the shapes are set."""
        weight, bias = linear.weight.detach(), linear.bias
        quantized = cls(
            linear.in_features,
            linear.out_features,
            scheme,
            bias=bias is not None,
            dtype=weight.dtype,
            device=weight.device,
        )
        if not weight.is_meta:
            for name, buffer in get_scheme(scheme).quantize(weight).items():
                quantized._set_buffer(name, buffer)
        if bias is not None:
            quantized.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return quantized.train(linear.training)

    def buffer_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of the buffers, in the scheme's order."""
        return dict(SCHEMES[self.scheme].buffer_shapes(self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight (out, in) in weight_dtype."""
        restore, parts = self.dequantizer()
        return restore(self.weight_dtype, *parts)

    def dequantizer(self) -> tuple[Dequantize, list[Tensor]]:
        """Return (dequantize, buffers); dequantize(dtype, *buffers) is the weight.

        Adapters call it inside an autograd node of their own.
        """
        restore = (
            _compiled_dequantize(self.scheme)
            if self.compiles_dequantize
            else partial(_dequantize, self.scheme)
        )
        return partial(restore, self.in_features), self._scheme_buffers()

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        dequantize, buffers = self.dequantizer()
        y: Tensor = _QuantizedLinearFunction.apply(  # type: ignore[no-untyped-call]
            input,
            self._bias_as(input.dtype),
            self.out_features if self.output_unused else None,
            dequantize,
            *buffers,
        )
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"

    def _bias_as(self, dtype: torch.dtype) -> Tensor | None:
        bias = self._parameters["bias"]
        return None if bias is None else bias.to(dtype)

    def _scheme_buffers(self) -> list[Tensor]:
        return [self.get_parameter(name) for name in SCHEMES[self.scheme].buffer_shapes(1, 1)]

    def _set_buffer(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # Detached, because a parameter's data may be replaced in place.
        buffers = {name: self.get_parameter(name).detach() for name in self.buffer_shapes()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in buffers.items():
            moved = self.get_parameter(name)
            # .to(dtype) and .half() must not change the stored codes and scales.
            if moved.dtype != buffer.dtype:
                self._set_buffer(name, buffer.to(moved.device))
        # fn is what .to, .half or .cuda apply; an empty tensor shows which dtype it gives.
        self.weight_dtype = fn(
            torch.empty(0, dtype=self.weight_dtype, device=self._scheme_buffers()[0].device)
        ).dtype
        return self


def compile_dequantize(network: nn.Module) -> None:
    """Compile how the quantized weights of a network are restored, at their first use."""
    for module in network.modules():
        if isinstance(module, QuantizedLinear):
            module.compiles_dequantize = True


def quantize_modules(
    network: nn.Module,
    names: Iterable[str],
    scheme: str,
    kind: type[QuantizedLinear] = QuantizedLinear,
) -> None:
    """Replace these linears of a network in place by quantized ones, one after the other."""
    for name in names:
        parent, _, own = name.rpartition(".")
        linear = network.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is not a linear: {type(linear).__name__}")
        setattr(network.get_submodule(parent), own, kind.from_linear(linear, scheme))
