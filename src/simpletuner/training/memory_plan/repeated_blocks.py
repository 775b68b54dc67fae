"""Measure a network of many equal blocks by running a few of them.

Most blocks of a transformer are equal: the same tensors, the same memory policy, the same inputs.
What one of them allocates, frees and computes, every other one does too. So of each run of equal
blocks only four are run, in both directions: the first, the last, and the two next to these, whose
neighbours are equal blocks as well. The others are counted: they change the live bytes by as much,
and their highest moment is as far above the bytes at their start. Parameters, gradients, optimizer
states and everything outside of the blocks are those of the whole network.

A segment is what is counted as one block. In the forward pass it lasts from the call of a block to
the call of the next one; in the backward pass, which runs in the opposite order, from the moment
when the gradients of the next block's inputs are complete to the moment when those of its own are.

That equal blocks count equally is not assumed but checked: the two measured blocks of each run must
agree, and what the skipped ones hold must be zero at the end. Else the whole network is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode, SegmentBytes

FORWARD, BACKWARD = "forward", "backward"
RUN_EDGE = 2  # blocks that are run at each end of a run of equal blocks
LEAST_SKIPPED = 2  # in a run; for fewer, nothing is gained

Streams = tuple[Tensor, ...]
TensorShape = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class EqualBlocks:
    """A run of equal blocks: the numbers first to last, of which those between are skipped."""

    first: int
    last: int

    @property
    def skipped(self) -> range:
        return range(self.first + RUN_EDGE, self.last - RUN_EDGE + 1)

    @property
    def measured(self) -> tuple[int, int]:
        """Return the blocks whose segments stand for the skipped ones: after and before them."""
        return self.first + 1, self.last - 1

    def neighbour(self, direction: str) -> int:
        """Return the measured block that a pass reaches before the skipped ones."""
        return self.measured[direction == BACKWARD]


def find_equal_blocks(
    blocks: Sequence[nn.Module], checkpointed: Sequence[int]
) -> list[EqualBlocks]:
    """Return the runs of equal blocks that are long enough to skip some."""
    signatures = [
        (number in checkpointed, *_signature(block)) for number, block in enumerate(blocks)
    ]
    runs = []
    for _, members in groupby(range(len(blocks)), key=signatures.__getitem__):
        numbers = list(members)
        run = EqualBlocks(numbers[0], numbers[-1])
        if len(run.skipped) >= LEAST_SKIPPED:
            runs.append(run)
    return runs


def _signature(block: nn.Module) -> tuple[object, ...]:
    tensors = (*block.named_parameters(), *block.named_buffers())
    shapes = (
        (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in tensors
    )
    return (tuple(type(part) for part in block.modules()), *shapes)


@dataclass
class RepeatedBlocks:
    """Counts skipped blocks while a network runs; `run_block` is called in place of its blocks.

    equal: the runs of equal blocks; none, and every block is run. count: the counter of the step.
    agrees: whether the measured blocks of each run agreed so far. leftover: bytes by part that were
    counted for skipped blocks, and not taken away again yet.
    """

    equal: Sequence[EqualBlocks]
    count: MemoryTrackerMode
    agrees: bool = True
    leftover: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._skipped = {number: run for run in self.equal for number in run.skipped}
        self._measured = {number: run for run in self.equal for number in run.measured}
        self._segments: dict[tuple[str, int], SegmentBytes] = {}
        self._output_shapes: dict[int, list[TensorShape]] = {}
        self._open: tuple[str, int] | None = None

    @property
    def is_exact(self) -> bool:
        """Return whether the counts are those of the whole network."""
        return self.agrees and not any(self.leftover.values())

    def run_block(
        self, number: int, block: nn.Module, streams: Streams, run: Callable[[], Streams]
    ) -> Streams:
        """Return the outputs of a block, without data if it is skipped.

        streams: its inputs, as the previous block gave them. run: runs it.
        """
        self._end_segment((FORWARD, number - 1))
        for stream in streams:
            if stream.requires_grad:
                stream.register_hook(self._backward_hook(number))
        self._begin_segment((FORWARD, number))
        if number in self._skipped:
            params = [each for each in block.parameters() if each.requires_grad]
            shapes = self._output_shapes[self._skipped[number].first]
            skipped: Streams = SkippedBlock.apply(shapes, *streams, *params)  # type: ignore[no-untyped-call]
            return skipped
        outputs = run()
        self._output_shapes[number] = [(each.shape, each.dtype) for each in outputs]
        return outputs

    def finish_pass(self) -> None:
        """Count what came after the last block."""
        self._end_segment(None)

    def run_every_block(self) -> None:
        """Skip no blocks from now on, and count nothing of former ones."""
        self.count.add_live_bytes({part: -size for part, size in self.leftover.items()})
        self._skipped, self._measured, self.leftover = {}, {}, {}

    def _backward_hook(self, number: int) -> Callable[[Tensor], None]:
        def complete(grad: Tensor) -> None:
            # A block with several streams gets here more than once.
            if self._open != (BACKWARD, number - 1):
                self._end_segment((BACKWARD, number))
                self._begin_segment((BACKWARD, number - 1))

        return complete

    def _begin_segment(self, segment: tuple[str, int]) -> None:
        self._open = segment
        self.count.begin_segment()

    def _end_segment(self, expected: tuple[str, int] | None) -> None:
        """Count the open segment, if it is the expected one of a measured or a skipped block.

        Another one is what follows the last block of a pass, and counts as it is.
        """
        if self._open is None:
            return
        direction, number = self._open
        is_block = self._open == expected
        self._open = None
        if is_block and number in self._skipped:
            template = self._segments[direction, self._skipped[number].neighbour(direction)]
            for part, size in self.count.replace_segment(template).items():
                self.leftover[part] = self.leftover.get(part, 0) + size
            return
        segment = self.count.end_segment()
        if is_block and number in self._measured:
            self._segments[direction, number] = segment
            before = self._measured[number].neighbour(direction)
            self.agrees &= self._segments[direction, before] == segment


class SkippedBlock(torch.autograd.Function):
    """A block that computes nothing: outputs and gradients are new tensors of the right shapes."""

    @staticmethod
    def forward(ctx: Any, outputs: Sequence[TensorShape], *inputs: Tensor) -> Streams:
        ctx.inputs = [(each.shape, each.dtype) for each in inputs]
        return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        return (
            None,
            *(
                torch.empty(shape, dtype=dtype) if is_needed else None
                for (shape, dtype), is_needed in zip(ctx.inputs, needed, strict=True)
            ),
        )
