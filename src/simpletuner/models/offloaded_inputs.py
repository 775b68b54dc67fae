"""The inputs of checkpointed blocks in host memory, and back on the device one block ahead.

The forward pass copies what autograd saves for a block to the host. The backward pass needs it in
the opposite order of the blocks: when the first tensor of a block is unpacked, the copies of all
tensors of the block before it start, and run while this one computes. So the inputs of two blocks
are on the device at a time (block_swap.DEVICE_BUFFERS), and only those of the last block are waited
for without work in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Waits for a copy that was started, and returns the tensor on the device.
FinishCopy = Callable[[], Tensor]


class OffloadedInputs:
    """Keeps saved tensors in host memory, block by block.

    copy_to_host: returns the tensor in host memory; the copy may still run. start_copy_back: starts
    the way back, after that copy, and returns what waits for it.
    """

    def __init__(
        self,
        copy_to_host: Callable[[Tensor], Tensor],
        start_copy_back: Callable[[Tensor], FinishCopy],
    ) -> None:
        self._copy_to_host = copy_to_host
        self._start_copy_back = start_copy_back
        # Autograd holds the blocks by what they saved: a pass without a backward pass leaves none.
        self._latest: weakref.ref[_Block] | None = None

    @contextmanager
    def save_block(self) -> Iterator[None]:
        """Run one block in this context, so that autograd keeps its tensors in host memory."""
        block = _Block(self._copy_to_host, self._start_copy_back, self._latest)
        self._latest = weakref.ref(block)
        with torch.autograd.graph.saved_tensors_hooks(block.pack, block.unpack):
            yield


class _Saved:
    """A saved tensor: in host memory, and on its way back once `finish` is set."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.finish: FinishCopy | None = None


class _Block:
    """The saved tensors of one block; autograd holds its two hooks, and so keeps it alive."""

    def __init__(
        self,
        copy_to_host: Callable[[Tensor], Tensor],
        start_copy_back: Callable[[Tensor], FinishCopy],
        previous: weakref.ref[_Block] | None,
    ) -> None:
        self._copy_to_host = copy_to_host
        self._start_copy_back = start_copy_back
        self._previous = previous
        self._saved: list[_Saved] = []
        self._started = False

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        # torch.utils.checkpoint also saves an empty tensor on the CPU next to the inputs.
        if tensor.device.type == "cpu":
            return tensor
        saved = _Saved(self._copy_to_host(tensor))
        self._saved.append(saved)
        return saved

    def unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.start_copies_back()
        previous = None if self._previous is None else self._previous()
        if previous is not None:
            previous.start_copies_back()
        # A second backward pass over the same graph copies once more.
        finish = saved.finish or self._start_copy_back(saved.host)
        saved.finish = None
        return finish()

    def start_copies_back(self) -> None:
        """Start all copies, once."""
        if not self._started:
            self._started = True
            for saved in self._saved:
                saved.finish = self._start_copy_back(saved.host)
