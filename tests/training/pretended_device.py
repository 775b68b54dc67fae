"""A GPU that is only pretended: tensors carry the name of a device, and refuse to be mixed.

The numbers stay in host memory, so autograd and every kernel run as on a CPU. What a GPU would
refuse, an operation on tensors of two devices, raises here as well; and every time that the host
would wait for a number of the device is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda")
CPU = torch.device("cpu")
aten = torch.ops.aten
# What copies between devices.
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
COPIES = {aten.copy_.default, aten._foreach_copy_.default, aten._foreach_copy.default}


class MixedDevices(RuntimeError):
    """Tensors of two devices in one operation."""


class PlacedTensor(Tensor):
    """A tensor with the name of a device. reads: how often the host has read from the GPU."""

    place: torch.device
    reads = 0

    @staticmethod
    def __new__(cls, tensor: Tensor, place: torch.device) -> PlacedTensor:
        with no_dispatch():
            placed = Tensor._make_subclass(cls, tensor.detach())
        placed.place = place
        return placed

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return PlacedTensor(self, self.place)

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.place = place_of(value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Positions may be on the CPU: torch copies them to the device of what they index.
        operands = (args[0], args[2:]) if func in INDEXED else args
        tensors = [leaf for leaf in tree_leaves((operands, kwargs)) if isinstance(leaf, Tensor)]
        places = {place_of(tensor) for tensor in tensors if tensor.ndim} or {
            place_of(tensor) for tensor in tensors
        }
        if len(places) > 1 and func not in COPIES:
            raise MixedDevices(f"{func}: {[(tuple(t.shape), str(place_of(t))) for t in tensors]}")
        place = place_of(tensors[0]) if func in COPIES else places.pop()
        if func is aten.copy_.default and place == CPU and place_of(tensors[1]) == GPU:
            PlacedTensor.reads += 1
        if func is aten._local_scalar_dense.default:
            PlacedTensor.reads += place == GPU
        with no_dispatch():
            out = func(*args, **kwargs)
        return tree_map(lambda leaf: placed_once(leaf, place), out)


def placed_once(value: Any, place: torch.device) -> Any:
    is_new = isinstance(value, Tensor) and not isinstance(value, PlacedTensor)
    return PlacedTensor(value, place) if is_new else value


def place_of(tensor: Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, PlacedTensor) else CPU


class PretendedGpu(TorchFunctionMode):
    """Makes tensors where the program asks for them, and moves them as it asks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # there is none without a driver
        if func is Tensor.tolist and isinstance(args[0], PlacedTensor):
            PlacedTensor.reads += args[0].place == GPU
            with no_dispatch():
                plain = args[0].detach()
            return plain.tolist()
        if func is Tensor.new_tensor and isinstance(args[0], PlacedTensor):
            return PlacedTensor(torch.tensor(args[1], dtype=args[0].dtype), args[0].place)
        if func in (Tensor.to, Tensor.cpu):
            return self.move(func, args, kwargs)
        if func is Tensor.backward:
            # torch leaves a mode while it handles a call, and hooks run inside of this one.
            with self:
                return run_backward(args[0])
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            return PlacedTensor(func(*args, **{**kwargs, "device": CPU}), GPU)
        return func(*args, **kwargs)

    def move(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        source, *rest = args
        if func is Tensor.cpu:
            rest = [CPU]
        rest = [each.place if isinstance(each, PlacedTensor) else each for each in rest]
        copy = kwargs.pop("copy", False)
        device, dtype, *_ = torch._C._nn._parse_to(*rest, **kwargs)
        if device is None:
            return source.to(*rest, copy=copy, **kwargs)
        target = GPU if device.type == "cuda" else CPU
        same = target == place_of(source)
        if same and not copy and dtype in (None, source.dtype):
            return source
        if target == CPU and not same and not kwargs.get("non_blocking"):
            PlacedTensor.reads += 1
        moved = source.to(dtype or source.dtype, copy=True)
        if isinstance(moved, PlacedTensor):
            moved.place = target
            return moved
        assert not moved.requires_grad
        return PlacedTensor(moved, target) if target == GPU else moved


def run_backward(loss: Tensor) -> None:
    """Call the engine itself, because torch's functions around it would ask the mode again."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True,
        accumulate_grad=True,
    )  # fmt: skip


def place_module(module: nn.Module, place: torch.device = GPU) -> None:
    """Replace all parameters and buffers by placed ones; those of an adapter stay trainable."""
    for part in module.modules():
        for name, param in list(part._parameters.items()):
            if param is not None:
                placed = PlacedTensor(param.data, place)
                part._parameters[name] = nn.Parameter(placed, requires_grad=param.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = PlacedTensor(buffer, place)


@contextmanager
def count_reads() -> Iterator[list[int]]:
    """Give a list that holds the number of reads inside the context, at its end."""
    before, found = PlacedTensor.reads, [0]
    yield found
    found[0] = PlacedTensor.reads - before
