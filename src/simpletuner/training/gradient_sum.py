"""Sum the gradients of the micro-batches of one optimizer step, within a process and over ranks.

Floating-point addition is not associative, so a sum depends on its order. TreeSum fixes the order
by the numbers of the micro-batches alone: the sum of micro-batches [first, end) is the sum of its
left part, the largest power of two below their count, plus that of its right part. Every number of
processes, one included, computes this same tree, so all of them get the same bits.

torch's DistributedDataParallel is not used: its mean over ranks weights the samples wrongly when
micro-batches have different sizes, its order of summation depends on the number of ranks, and it
would check and send the frozen base at the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simpletuner.training.world import World

Gradients = list[Tensor | None]  # one per parameter; None where a parameter was not used
BUCKET_BYTES = 64 << 20


@dataclass(frozen=True)
class TreeNode:
    """The sum of micro-batches [first, end), of [first, middle) plus [middle, end)."""

    first: int
    middle: int
    end: int


def inner_nodes(first: int, end: int) -> Iterator[TreeNode]:
    """Yield the nodes of the tree over [first, end); children come before their parent."""
    count = end - first
    if count < 2:
        return
    middle = first + (1 << (count - 1).bit_length() - 1)
    yield from inner_nodes(first, middle)
    yield from inner_nodes(middle, end)
    yield TreeNode(first, middle, end)


class GradientSum:
    """The sum in the order in which the passes run, and then over all ranks in one all-reduce.

    It needs no memory in addition to the gradients, as full fine-tuning requires. Over several
    ranks its rounding depends on their number.
    """

    def __init__(self, params: Sequence[nn.Parameter], world: World) -> None:
        self.params = params
        self.world = world

    def add(self, place: int) -> None:
        """Take the gradients that one backward pass has added to `param.grad`.

        place: number of the micro-batch within the step. Micro-batches come in ascending order.
        """

    def finish(self) -> None:
        """Leave the sum over all micro-batches of all ranks in `param.grad`, on every rank."""
        if self.world.size == 1:
            return
        for param in self.params:
            if param.grad is None:
                # Every rank must send the same tensors, also where its batches did not use the
                # parameter.
                param.grad = torch.zeros_like(param)
        for bucket in make_buckets([param.grad for param in self.params]):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self.world.all_reduce(flat)
            copy_from_flat(flat, bucket)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum over all parts of the gradient of a number of this rank's part.

        Here every rank has the whole gradient.
        """
        return value


class TreeSum(GradientSum):
    """The sum in the order of a fixed binary tree over the numbers of the micro-batches.

    It holds up to log2(micro_batches) + 1 sums at once, which is little for an adapter.
    """

    def __init__(self, params: Sequence[nn.Parameter], world: World, micro_batches: int) -> None:
        super().__init__(params, world)
        self.micro_batches = micro_batches
        self.nodes = list(inner_nodes(0, micro_batches))
        shares = world.shares(micro_batches)
        self.owner = {place: rank for rank, share in enumerate(shares) for place in share}
        self._sums: dict[tuple[int, int], Gradients] = {}

    def add(self, place: int) -> None:
        if self.micro_batches == self.world.size == 1:
            return
        self._sums[place, place + 1] = [param.grad for param in self.params]
        for param in self.params:
            param.grad = None
        for node in self.nodes:
            if node.end == place + 1 and self._is_local(node):
                self._merge(node, self._sums.pop((node.middle, node.end)))

    def finish(self) -> None:
        if self.micro_batches == self.world.size == 1:
            return
        own = self.world.rank
        for node in self.nodes:
            # The nodes come in the same order on every rank, children first, so a send always finds
            # its receive.
            left, right = self.owner[node.first], self.owner[node.middle]
            if left == right:
                # A local node whose right part came from another rank in this loop.
                if left == own and (node.middle, node.end) in self._sums:
                    self._merge(node, self._sums.pop((node.middle, node.end)))
            elif own == left:
                self._merge(node, self._receive(right))
            elif own == right:
                self._send(self._sums.pop((node.middle, node.end)), left)
        total = self._sums.pop((0, self.micro_batches), None)
        for param, grad in zip(self.params, self._broadcast(total), strict=True):
            param.grad = grad

    def _is_local(self, node: TreeNode) -> bool:
        return self.owner[node.first] == self.owner[node.end - 1] == self.world.rank

    def _merge(self, node: TreeNode, right: Gradients) -> None:
        left = self._sums.pop((node.first, node.middle))
        pairs = [
            (mine, other)
            for mine, other in zip(left, right, strict=True)
            if mine is not None and other is not None
        ]
        if pairs:
            mines, others = zip(*pairs, strict=True)
            torch._foreach_add_(mines, others)
        left = [other if mine is None else mine for mine, other in zip(left, right, strict=True)]
        self._sums[node.first, node.end] = left

    # On the wire: one byte per parameter says whether it has a gradient; the gradients follow.

    def _send(self, grads: Gradients, to: int) -> None:
        self.world.send(self._mask(grads), to)
        for bucket in make_buckets(grads):
            self.world.send(torch.cat([tensor.reshape(-1) for tensor in bucket]), to)

    def _receive(self, source: int) -> Gradients:
        grads = self._allocate(self.world.receive(self._mask([None] * len(self.params)), source))
        for bucket in make_buckets(grads):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            copy_from_flat(self.world.receive(flat, source), bucket)
        return grads

    def _broadcast(self, total: Gradients | None) -> Gradients:
        if self.world.size == 1:
            assert total is not None
            return total
        mask = self._mask([None] * len(self.params) if total is None else total)
        self.world.broadcast(mask)
        grads = self._allocate(mask) if total is None else total
        for bucket in make_buckets(grads):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self.world.broadcast(flat)
            if total is None:
                copy_from_flat(flat, bucket)
        return grads

    def _mask(self, grads: Gradients) -> Tensor:
        has_gradient = [grad is not None for grad in grads]
        return torch.tensor(has_gradient, dtype=torch.uint8, device=self.params[0].device)

    def _allocate(self, mask: Tensor) -> Gradients:
        return [
            torch.empty_like(param, memory_format=torch.contiguous_format) if present else None
            for param, present in zip(self.params, mask.tolist(), strict=True)
        ]


def held_sums(micro_batches: int) -> int:
    """Return how many sums a TreeSum of one process holds at most before the last gradient."""
    # After micro-batch n - 1 there is one sum for each 1 in the binary form of n.
    return max(place.bit_count() for place in range(micro_batches))


def make_buckets(
    grads: Sequence[Tensor | None], limit: int | None = None
) -> Iterator[list[Tensor]]:
    """Yield the gradients in groups of one dtype and about `limit` bytes, one transfer for each.

    limit: BUCKET_BYTES unless it is given.
    """
    limit = limit or BUCKET_BYTES
    present = [grad for grad in grads if grad is not None]
    for dtype in dict.fromkeys(grad.dtype for grad in present):
        bucket: list[Tensor] = []
        size = 0
        for grad in present:
            if grad.dtype != dtype:
                continue
            if bucket and size + grad.nbytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.nbytes
        yield bucket


def copy_from_flat(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy consecutive parts of a flat tensor into the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    shaped = [part.view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)]
    torch._foreach_copy_(list(tensors), shaped)
