"""Frozen weights of some blocks wait in host memory and come to the device for each pass, one block ahead.

They never change, so nothing is copied back: the room of a block that was used is given to the next. On the
device there is room for two blocks, whatever happens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.errors import ConfigError

ALIGNMENT = 256  # bytes; what device allocators promise for a tensor of its own
ROOMS = 2  # one that computes, one that is filled


class Room(ABC):
    """Device memory that holds one block's frozen weights at a time. space: uint8, on the device."""

    space: Tensor

    @abstractmethod
    def fill(self, parcel: Tensor) -> None:
        """Begin to copy a parcel in, once nothing reads what is there."""

    @abstractmethod
    def ready(self) -> None:
        """What is computed from now on sees the whole parcel."""

    @abstractmethod
    def read(self) -> None:
        """What was computed up to now is the last that reads the parcel."""


class Lane(ABC):
    """The way between host and device memory."""

    @abstractmethod
    def keep(self, parcel: Tensor) -> Tensor:
        """A flat uint8 tensor on the CPU, as the lane wants to have it: in page-locked memory."""

    @abstractmethod
    def room(self, size: int) -> Room: ...

    @abstractmethod
    def inputs_on_host(self) -> AbstractContextManager[object]:
        """What autograd keeps inside is kept in host memory."""


class _CudaRoom(Room):
    """Filled on a stream of its own; two events keep the copy and the computation apart."""

    def __init__(self, size: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.space = torch.empty(size, dtype=torch.uint8, device=device)
        self._stream, self._filled, self._free = stream, torch.cuda.Event(), torch.cuda.Event()
        self.read()  # the allocator may hand out memory that earlier kernels still use

    def fill(self, parcel: Tensor) -> None:
        self._stream.wait_event(self._free)
        with torch.cuda.stream(self._stream):
            self.space[: len(parcel)].copy_(parcel, non_blocking=True)
        self._filled.record(self._stream)

    def ready(self) -> None:
        torch.cuda.current_stream(self.space.device).wait_event(self._filled)

    def read(self) -> None:
        self._free.record(torch.cuda.current_stream(self.space.device))


class CudaLane(Lane):
    """CUDA and ROCm: page-locked memory, one stream each way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def keep(self, parcel: Tensor) -> Tensor:
        try:
            return parcel.pin_memory()
        except RuntimeError:  # the system has a limit for such memory; copies from any other are only slower
            return parcel

    def room(self, size: int) -> Room:
        return _CudaRoom(size, self._device, self._inward)

    def inputs_on_host(self) -> AbstractContextManager[object]:
        return torch.autograd.graph.saved_tensors_hooks(self._out, self._back)

    def _out(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":  # older checkpoints keep an empty tensor there beside the inputs
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._outward)
        return host

    def _back(self, host: Tensor) -> Tensor:
        torch.cuda.current_stream(self._device).wait_stream(self._outward)
        return host.to(self._device, non_blocking=True)


def lane_for(device: torch.device | None) -> Lane:
    """ConfigError where host and device share their memory: there is nothing to gain."""
    if device is None or device.type != "cuda":
        raise ConfigError(
            'musubi_blocks_to_swap and gradient_checkpointing_backend = "offload" need a GPU with memory of'
            f' its own; "{device or "cpu"}" computes in host memory. Use musubi_blocks_to_swap = 0 and the'
            ' backend "torch"'
        )
    return CudaLane(device)


@dataclass(frozen=True)
class _Place:
    """A tensor's place in its block's parcel, and what it is while the block is away."""

    tensor: Tensor
    offset: int
    host: Tensor

    def within(self, space: Tensor) -> Tensor:
        return _view(space, self.offset, self.host)


def _view(space: Tensor, offset: int, like: Tensor) -> Tensor:
    return space[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


@dataclass(frozen=True)
class _Parcel:
    """All frozen tensors of a block, one behind the other in host memory."""

    bytes: Tensor
    places: tuple[_Place, ...]

    @classmethod
    def pack(cls, block: nn.Module, lane: Lane) -> _Parcel:
        frozen = [tensor for tensor in (*block.parameters(), *block.buffers()) if not tensor.requires_grad]
        for tensor in frozen:
            if type(tensor) not in (Tensor, nn.Parameter) or type(tensor.data) is not Tensor:
                raise ConfigError(
                    "musubi_blocks_to_swap works with plain weights and with base_model_precision int8, int4,"
                    f" nf4 and fp8, not with {type(tensor.data).__name__}"
                )
        offsets = [0]
        for tensor in frozen:
            offsets.append(offsets[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
        gathered = torch.empty(offsets[-1], dtype=torch.uint8)
        for tensor, offset in zip(frozen, offsets, strict=False):
            _view(gathered, offset, tensor).copy_(tensor.data)
        kept = lane.keep(gathered)
        places = tuple(
            _Place(tensor, offset, _view(kept, offset, tensor))
            for tensor, offset in zip(frozen, offsets, strict=False)
        )
        return cls(kept, places)

    def bind(self, space: Tensor | None) -> None:
        """None: to host memory, where a kernel of the device fails loudly and a file is written rightly."""
        for place in self.places:
            place.tensor.data = place.host if space is None else place.within(space)


@dataclass(eq=False)
class _Tenancy:
    """A room, whose parcel is in it, and whether the block is bound to it."""

    room: Room
    number: int | None = None
    bound: bool = False


class Swap:
    """Frozen tensors of `blocks` (by number); what requires a gradient now stays on the device for good."""

    def __init__(self, blocks: Mapping[int, nn.Module], lane: Lane) -> None:
        self._order = sorted(blocks)
        self._parcels: dict[int, _Parcel] = {}
        for number in self._order:
            parcel = self._parcels[number] = _Parcel.pack(blocks[number], lane)
            parcel.bind(None)
        self._held = {id(place.tensor) for parcel in self._parcels.values() for place in parcel.places}
        size = max(len(parcel.bytes) for parcel in self._parcels.values())
        # The one used last is the last of the list.
        self._tenancies = [_Tenancy(lane.room(size)) for _ in range(min(ROOMS, len(blocks)))]

    def __contains__(self, number: int) -> bool:
        return number in self._parcels

    def holds(self, tensor: Tensor) -> bool:
        return id(tensor) in self._held

    def close(self) -> None:
        """All weights are in host memory; nothing is on its way into the rooms when they are given up."""
        for tenancy in self._tenancies:
            self._leave(tenancy)
            tenancy.room.ready()
        self._tenancies.clear()
        self._parcels.clear()  # another arrangement packs its own; both would be twice the weights

    @contextmanager
    def present(self, number: int) -> Iterator[None]:
        """A block's forward pass. Behind the last one comes the backward pass, or the next pass."""
        at = self._order.index(number)
        follows = self._order[at + 1] if at + 1 < len(self._order) else None
        if follows is None:
            follows = self._order[-2:][0] if torch.is_grad_enabled() else self._order[0]
        self._bring(number, follows)
        try:
            yield
        finally:
            self._leave(self._tenancies[-1])

    def after(self, number: int, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Marks where the block's backward pass begins; it ends when the room is wanted for another."""
        out: tuple[Tensor, ...] = _After.apply(self, number, *streams)
        return out

    def begin_backward(self, number: int) -> None:
        at = self._order.index(number)
        self._bring(number, self._order[at - 1] if at else self._order[:2][-1])

    def _bring(self, number: int, follows: int) -> None:
        tenancy = self._find(number) or self._send(number)
        self._tenancies.remove(tenancy)
        self._tenancies.append(tenancy)
        tenancy.room.ready()
        self._parcels[number].bind(tenancy.room.space)
        tenancy.bound = True
        if len(self._tenancies) > 1 and self._find(follows) is None:
            self._send(follows)

    def _send(self, number: int) -> _Tenancy:
        tenancy = self._tenancies[0]
        self._leave(tenancy)
        tenancy.number = number
        tenancy.room.fill(self._parcels[number].bytes)
        return tenancy

    def _find(self, number: int) -> _Tenancy | None:
        return next((one for one in self._tenancies if one.number == number), None)

    def _leave(self, tenancy: _Tenancy) -> None:
        """The room keeps the bytes: a block that is asked for again at once is not sent again."""
        if tenancy.bound and tenancy.number is not None:
            tenancy.room.read()
            self._parcels[tenancy.number].bind(None)
            tenancy.bound = False


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, swap: Swap, number: int, *streams: Tensor) -> tuple[Tensor, ...]:
        ctx.swap, ctx.number = swap, number
        ctx.set_materialize_grads(False)
        return streams

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.swap.begin_backward(ctx.number)
        return None, None, *grads
