"""Block swap: frozen weights wait in host memory and are copied to the device for each pass.

The protocol. Frozen weights never change, so they are only ever copied from host to device, and a
buffer on the device can be overwritten as soon as its block has been computed. Each swapped block
is packed into one contiguous, page-locked (pinned) byte tensor, so that one asynchronous copy moves
all its weights. The device holds two buffers of the size of the largest block: while the block in
one buffer computes, the next block is copied into the other.

Two CUDA events per buffer order the copy stream and the compute stream. `copy_done` is recorded
after the copy, and the compute stream waits for it before it uses the block. `compute_done` is
recorded after the last kernel that reads the buffer, and the next copy waits for it before it
overwrites the bytes. The CPU never waits.

A block is "bound" while its parameters' `.data` are views of a buffer; otherwise they are views of
the pinned host tensor. The forward pass binds a block in `on_device` and unbinds it at the end. The
backward pass has no such bracket in Python: autograd decides when a block runs. Therefore every
output of a swapped block goes through `_BackwardMarker`, an identity whose backward runs
immediately before the backward of that block, and there the block is bound again. It stays bound
until its buffer is needed for another block. With gradient checkpointing, which swapped blocks must
use, nothing saved by autograd refers to the bound views, so unbinding after the forward pass is
safe.
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
from simpletuner.models.offloaded_inputs import FinishCopy, OffloadedInputs
from simpletuner.models.page_locked import PageLockRefused, copy_to_page_locked

ALIGNMENT = 256  # bytes; the alignment that device allocators guarantee for a tensor
DEVICE_BUFFERS = 2  # one is computed with while the other one is filled


class DeviceBuffer(ABC):
    """Device memory for one block's frozen weights at a time. memory: uint8, on the device."""

    memory: Tensor

    @abstractmethod
    def start_copy(self, packed: Tensor) -> None:
        """Start copying a packed block into the buffer, after its last reader has finished."""

    @abstractmethod
    def wait_for_copy(self) -> None:
        """Make the current stream wait until the copy is complete."""

    @abstractmethod
    def record_last_use(self) -> None:
        """Record that the kernels issued so far are the last ones that read the buffer."""


class TransferEngine(ABC):
    """Copies between host and device memory."""

    @abstractmethod
    def pin_memory(self, packed: Tensor) -> Tensor:
        """Return the flat uint8 CPU tensor in page-locked memory, if the system allows it."""

    @abstractmethod
    def allocate_buffer(self, size: int) -> DeviceBuffer:
        """Allocate a device buffer of `size` bytes."""

    @abstractmethod
    def offload_saved_tensors(self) -> AbstractContextManager[object]:
        """Return a context for one block, in which autograd keeps its saved tensors on the host."""


class _CudaBuffer(DeviceBuffer):
    """A buffer filled on a separate stream; two events order copies and computation."""

    def __init__(self, size: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._stream = stream
        self._copy_done = torch.cuda.Event()
        self._compute_done = torch.cuda.Event()
        # The caching allocator may return memory that kernels issued earlier still use.
        self.record_last_use()

    def start_copy(self, packed: Tensor) -> None:
        self._stream.wait_event(self._compute_done)
        with torch.cuda.stream(self._stream):
            self.memory[: len(packed)].copy_(packed, non_blocking=True)
        self._copy_done.record(self._stream)

    def wait_for_copy(self) -> None:
        torch.cuda.current_stream(self.memory.device).wait_event(self._copy_done)

    def record_last_use(self) -> None:
        self._compute_done.record(torch.cuda.current_stream(self.memory.device))


class CudaTransferEngine(TransferEngine):
    """Transfers on CUDA and ROCm: page-locked memory and one stream per direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._to_device_stream = torch.cuda.Stream(device)
        self._to_host_stream = torch.cuda.Stream(device)
        self._offloaded = OffloadedInputs(self._copy_to_host, self._start_copy_back)

    def pin_memory(self, packed: Tensor) -> Tensor:
        try:
            return copy_to_page_locked(packed)
        except PageLockRefused:
            # The system limits page-locked memory; copies from pageable memory are only slower.
            return packed

    def allocate_buffer(self, size: int) -> DeviceBuffer:
        return _CudaBuffer(size, self._device, self._to_device_stream)

    def offload_saved_tensors(self) -> AbstractContextManager[object]:
        return self._offloaded.save_block()

    def _copy_to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._to_host_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._to_host_stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._to_host_stream)
        return host

    def _start_copy_back(self, host: Tensor) -> FinishCopy:
        stream = self._to_device_stream
        copy = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        # Kernels issued earlier may still use this memory, and the way to the host must be over.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        stream.wait_stream(self._to_host_stream)
        with torch.cuda.stream(stream):
            copy.copy_(host, non_blocking=True)
        copy.record_stream(stream)
        done = stream.record_event()

        def finish() -> Tensor:
            torch.cuda.current_stream(self._device).wait_event(done)
            return copy

        return finish


def create_transfer_engine(device: torch.device | None) -> TransferEngine:
    """Return the engine for a device. Raises ConfigError for a device without memory of its own."""
    if device is None or device.type != "cuda":
        raise ConfigError(
            'musubi_blocks_to_swap and gradient_checkpointing_backend = "offload" need a GPU with'
            f' memory of its own, but "{device or "cpu"}" computes in host memory. Set'
            ' musubi_blocks_to_swap = 0 and gradient_checkpointing_backend = "torch"'
        )
    return CudaTransferEngine(device)


@dataclass(frozen=True)
class _TensorSlot:
    """The position of a tensor in its packed block, and its view of host memory."""

    tensor: Tensor
    offset: int
    host_view: Tensor

    def device_view(self, memory: Tensor) -> Tensor:
        return _view_at(memory, self.offset, self.host_view)


def _view_at(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


@dataclass(frozen=True)
class _PinnedBlock:
    """All frozen tensors of a block, one after the other in host memory."""

    host_bytes: Tensor
    slots: tuple[_TensorSlot, ...]

    @classmethod
    def pack(cls, block: nn.Module, engine: TransferEngine) -> _PinnedBlock:
        frozen = [
            tensor for tensor in (*block.parameters(), *block.buffers()) if not tensor.requires_grad
        ]
        for tensor in frozen:
            if type(tensor) not in (Tensor, nn.Parameter) or type(tensor.data) is not Tensor:
                raise ConfigError(
                    "musubi_blocks_to_swap supports plain weights and base_model_precision int8,"
                    f" int4, nf4 and fp8, but not {type(tensor.data).__name__}"
                )
        offsets = [0]
        for tensor in frozen:
            offsets.append(offsets[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
        gathered = torch.empty(offsets[-1], dtype=torch.uint8)
        for tensor, offset in zip(frozen, offsets, strict=False):
            _view_at(gathered, offset, tensor).copy_(tensor.data)
        pinned = engine.pin_memory(gathered)
        slots = tuple(
            _TensorSlot(tensor, offset, _view_at(pinned, offset, tensor))
            for tensor, offset in zip(frozen, offsets, strict=False)
        )
        return cls(pinned, slots)

    def bind(self, memory: Tensor | None) -> None:
        """Point the parameters at a device buffer, or back at host memory (None).

        With its weights in host memory, a kernel on the device fails loudly instead of reading
        stale bytes, and a checkpoint file is written correctly.
        """
        for slot in self.slots:
            slot.tensor.data = slot.host_view if memory is None else slot.device_view(memory)


@dataclass(eq=False)
class _BufferLease:
    """A buffer, the block whose weights it holds, and whether that block is bound to it."""

    buffer: DeviceBuffer
    block_number: int | None = None
    bound: bool = False


class BlockSwap:
    """Swaps the frozen tensors of `blocks` (by number); trainable tensors stay on the device."""

    def __init__(self, blocks: Mapping[int, nn.Module], engine: TransferEngine) -> None:
        self._block_order = sorted(blocks)
        self._pinned_blocks: dict[int, _PinnedBlock] = {}
        for number in self._block_order:
            pinned = _PinnedBlock.pack(blocks[number], engine)
            pinned.bind(None)
            self._pinned_blocks[number] = pinned
        self._tensor_ids = {
            id(slot.tensor) for packed in self._pinned_blocks.values() for slot in packed.slots
        }
        size = max(len(packed.host_bytes) for packed in self._pinned_blocks.values())
        # Ordered by use: the buffer that was used most recently is the last one.
        self._leases = [
            _BufferLease(engine.allocate_buffer(size))
            for _ in range(min(DEVICE_BUFFERS, len(blocks)))
        ]

    def __contains__(self, number: int) -> bool:
        return number in self._pinned_blocks

    def owns_tensor(self, tensor: Tensor) -> bool:
        """Return whether this object decides where the tensor is."""
        return id(tensor) in self._tensor_ids

    def close(self) -> None:
        """Bind every block to host memory and free the buffers once no copy into them runs."""
        for lease in self._leases:
            self._release(lease)
            lease.buffer.wait_for_copy()
        self._leases.clear()
        # The next placement packs the weights again; both copies would be twice the memory.
        self._pinned_blocks.clear()

    @contextmanager
    def on_device(self, number: int) -> Iterator[None]:
        """Keep a block's weights on the device during its forward pass.

        The block that is copied ahead is the next swapped one. After the last one it is the one
        that the backward pass needs next, or without gradient the first one of the next forward
        pass.
        """
        position = self._block_order.index(number)
        next_number = (
            self._block_order[position + 1] if position + 1 < len(self._block_order) else None
        )
        if next_number is None:
            next_number = (
                self._block_order[-2:][0] if torch.is_grad_enabled() else self._block_order[0]
            )
        self._make_resident(number, next_number)
        try:
            yield
        finally:
            self._release(self._leases[-1])

    def mark_backward_start(self, number: int, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return a block's outputs unchanged, marked so that its backward pass binds it first."""
        marked: tuple[Tensor, ...] = _BackwardMarker.apply(  # type: ignore[no-untyped-call]
            self, number, *streams
        )
        return marked

    def begin_backward(self, number: int) -> None:
        """Bring a block to the device for its backward pass and start copying the one before it."""
        position = self._block_order.index(number)
        previous = self._block_order[position - 1] if position else self._block_order[:2][-1]
        self._make_resident(number, previous)

    def _make_resident(self, number: int, next_number: int) -> None:
        lease = self._find_lease(number) or self._start_transfer(number)
        self._leases.remove(lease)
        self._leases.append(lease)
        lease.buffer.wait_for_copy()
        self._pinned_blocks[number].bind(lease.buffer.memory)
        lease.bound = True
        if len(self._leases) > 1 and self._find_lease(next_number) is None:
            self._start_transfer(next_number)

    def _start_transfer(self, number: int) -> _BufferLease:
        lease = self._leases[0]
        self._release(lease)
        lease.block_number = number
        lease.buffer.start_copy(self._pinned_blocks[number].host_bytes)
        return lease

    def _find_lease(self, number: int) -> _BufferLease | None:
        return next((lease for lease in self._leases if lease.block_number == number), None)

    def _release(self, lease: _BufferLease) -> None:
        """Unbind the block of a buffer; the buffer keeps the bytes in case they are needed next."""
        if lease.bound and lease.block_number is not None:
            lease.buffer.record_last_use()
            self._pinned_blocks[lease.block_number].bind(None)
            lease.bound = False


class _BackwardMarker(torch.autograd.Function):
    """An identity whose backward pass runs just before that of the block it marks."""

    @staticmethod
    def forward(ctx: Any, swap: BlockSwap, number: int, *streams: Tensor) -> tuple[Tensor, ...]:
        ctx.swap = swap
        ctx.number = number
        ctx.set_materialize_grads(False)
        return streams

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.swap.begin_backward(ctx.number)
        return None, None, *grads
