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
DEVICE_BUFFERS = 2  # one that computes, one that is filled


class DeviceBuffer(ABC):
    """Device memory that holds one block's frozen weights at a time. space: uint8, on the device."""

    memory: Tensor

    @abstractmethod
    def start_copy(self, parcel: Tensor) -> None:
        """Begin to copy a parcel in, once nothing reads what is there."""

    @abstractmethod
    def wait_for_copy(self) -> None:
        """What is computed from now on sees the whole parcel."""

    @abstractmethod
    def record_last_use(self) -> None:
        """What was computed up to now is the last that reads the parcel."""


class TransferEngine(ABC):
    """The way between host and device memory."""

    @abstractmethod
    def pin_memory(self, parcel: Tensor) -> Tensor:
        """A flat uint8 tensor on the CPU, as the lane wants to have it: in page-locked memory."""

    @abstractmethod
    def allocate_buffer(self, size: int) -> DeviceBuffer: ...

    @abstractmethod
    def offload_saved_tensors(self) -> AbstractContextManager[object]:
        """What autograd keeps inside is kept in host memory."""


class _CudaBuffer(DeviceBuffer):
    """Filled on a stream of its own; two events keep the copy and the computation apart."""

    def __init__(self, size: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._stream, self._copy_done, self._compute_done = (
            stream,
            torch.cuda.Event(),
            torch.cuda.Event(),
        )
        self.record_last_use()  # the allocator may hand out memory that earlier kernels still use

    def start_copy(self, parcel: Tensor) -> None:
        self._stream.wait_event(self._compute_done)
        with torch.cuda.stream(self._stream):
            self.memory[: len(parcel)].copy_(parcel, non_blocking=True)
        self._copy_done.record(self._stream)

    def wait_for_copy(self) -> None:
        torch.cuda.current_stream(self.memory.device).wait_event(self._copy_done)

    def record_last_use(self) -> None:
        self._compute_done.record(torch.cuda.current_stream(self.memory.device))


class CudaTransferEngine(TransferEngine):
    """CUDA and ROCm: page-locked memory, one stream each way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._to_device_stream, self._to_host_stream = (
            torch.cuda.Stream(device),
            torch.cuda.Stream(device),
        )

    def pin_memory(self, parcel: Tensor) -> Tensor:
        try:
            return parcel.pin_memory()
        except (
            RuntimeError
        ):  # the system has a limit for such memory; copies from any other are only slower
            return parcel

    def allocate_buffer(self, size: int) -> DeviceBuffer:
        return _CudaBuffer(size, self._device, self._to_device_stream)

    def offload_saved_tensors(self) -> AbstractContextManager[object]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack_to_host, self._unpack_to_device)

    def _pack_to_host(self, tensor: Tensor) -> Tensor:
        if (
            tensor.device.type == "cpu"
        ):  # older checkpoints keep an empty tensor there beside the inputs
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._to_host_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._to_host_stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._to_host_stream)
        return host

    def _unpack_to_device(self, host: Tensor) -> Tensor:
        torch.cuda.current_stream(self._device).wait_stream(self._to_host_stream)
        return host.to(self._device, non_blocking=True)


def create_transfer_engine(device: torch.device | None) -> TransferEngine:
    """ConfigError where host and device share their memory: there is nothing to gain."""
    if device is None or device.type != "cuda":
        raise ConfigError(
            'musubi_blocks_to_swap and gradient_checkpointing_backend = "offload" need a GPU with memory of'
            f' its own; "{device or "cpu"}" computes in host memory. Use musubi_blocks_to_swap = 0 and the'
            ' backend "torch"'
        )
    return CudaTransferEngine(device)


@dataclass(frozen=True)
class _TensorSlot:
    """A tensor's place in its block's parcel, and what it is while the block is away."""

    tensor: Tensor
    offset: int
    host_view: Tensor

    def device_view(self, space: Tensor) -> Tensor:
        return _view_at(space, self.offset, self.host_view)


def _view_at(space: Tensor, offset: int, like: Tensor) -> Tensor:
    return space[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


@dataclass(frozen=True)
class _PinnedBlock:
    """All frozen tensors of a block, one behind the other in host memory."""

    host_bytes: Tensor
    slots: tuple[_TensorSlot, ...]

    @classmethod
    def pack(cls, block: nn.Module, lane: TransferEngine) -> _PinnedBlock:
        frozen = [
            tensor for tensor in (*block.parameters(), *block.buffers()) if not tensor.requires_grad
        ]
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
            _view_at(gathered, offset, tensor).copy_(tensor.data)
        kept = lane.pin_memory(gathered)
        places = tuple(
            _TensorSlot(tensor, offset, _view_at(kept, offset, tensor))
            for tensor, offset in zip(frozen, offsets, strict=False)
        )
        return cls(kept, places)

    def bind(self, space: Tensor | None) -> None:
        """None: to host memory, where a kernel of the device fails loudly and a file is written rightly."""
        for place in self.slots:
            place.tensor.data = place.host_view if space is None else place.device_view(space)


@dataclass(eq=False)
class _BufferLease:
    """A room, whose parcel is in it, and whether the block is bound to it."""

    buffer: DeviceBuffer
    block_number: int | None = None
    bound: bool = False


class BlockSwap:
    """Frozen tensors of `blocks` (by number); what requires a gradient now stays on the device for good."""

    def __init__(self, blocks: Mapping[int, nn.Module], lane: TransferEngine) -> None:
        self._block_order = sorted(blocks)
        self._pinned_blocks: dict[int, _PinnedBlock] = {}
        for number in self._block_order:
            parcel = self._pinned_blocks[number] = _PinnedBlock.pack(blocks[number], lane)
            parcel.bind(None)
        self._tensor_ids = {
            id(place.tensor) for parcel in self._pinned_blocks.values() for place in parcel.slots
        }
        size = max(len(parcel.host_bytes) for parcel in self._pinned_blocks.values())
        # The one used last is the last of the list.
        self._leases = [
            _BufferLease(lane.allocate_buffer(size))
            for _ in range(min(DEVICE_BUFFERS, len(blocks)))
        ]

    def __contains__(self, number: int) -> bool:
        return number in self._pinned_blocks

    def owns_tensor(self, tensor: Tensor) -> bool:
        return id(tensor) in self._tensor_ids

    def close(self) -> None:
        """All weights are in host memory; nothing is on its way into the rooms when they are given up."""
        for tenancy in self._leases:
            self._release(tenancy)
            tenancy.buffer.wait_for_copy()
        self._leases.clear()
        self._pinned_blocks.clear()  # another arrangement packs its own; both would be twice the weights

    @contextmanager
    def on_device(self, number: int) -> Iterator[None]:
        """A block's forward pass. Behind the last one comes the backward pass, or the next pass."""
        at = self._block_order.index(number)
        follows = self._block_order[at + 1] if at + 1 < len(self._block_order) else None
        if follows is None:
            follows = self._block_order[-2:][0] if torch.is_grad_enabled() else self._block_order[0]
        self._make_resident(number, follows)
        try:
            yield
        finally:
            self._release(self._leases[-1])

    def mark_backward_start(self, number: int, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Marks where the block's backward pass begins; it ends when the room is wanted for another."""
        out: tuple[Tensor, ...] = _BackwardMarker.apply(self, number, *streams)
        return out

    def begin_backward(self, number: int) -> None:
        at = self._block_order.index(number)
        self._make_resident(number, self._block_order[at - 1] if at else self._block_order[:2][-1])

    def _make_resident(self, number: int, follows: int) -> None:
        tenancy = self._find_lease(number) or self._start_transfer(number)
        self._leases.remove(tenancy)
        self._leases.append(tenancy)
        tenancy.buffer.wait_for_copy()
        self._pinned_blocks[number].bind(tenancy.buffer.memory)
        tenancy.bound = True
        if len(self._leases) > 1 and self._find_lease(follows) is None:
            self._start_transfer(follows)

    def _start_transfer(self, number: int) -> _BufferLease:
        tenancy = self._leases[0]
        self._release(tenancy)
        tenancy.block_number = number
        tenancy.buffer.start_copy(self._pinned_blocks[number].host_bytes)
        return tenancy

    def _find_lease(self, number: int) -> _BufferLease | None:
        return next((one for one in self._leases if one.block_number == number), None)

    def _release(self, tenancy: _BufferLease) -> None:
        """The room keeps the bytes: a block that is asked for again at once is not sent again."""
        if tenancy.bound and tenancy.block_number is not None:
            tenancy.buffer.record_last_use()
            self._pinned_blocks[tenancy.block_number].bind(None)
            tenancy.bound = False


class _BackwardMarker(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, swap: BlockSwap, number: int, *streams: Tensor) -> tuple[Tensor, ...]:
        ctx.swap, ctx.number = swap, number
        ctx.set_materialize_grads(False)
        return streams

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.swap.begin_backward(ctx.number)
        return None, None, *grads
