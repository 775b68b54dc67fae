"""Bytes that the processes of a run send each other in an optimizer step, counted on paper.

The counts follow training/gradient_sum.py and training/sharding.py. A few bytes more are exchanged
for the losses and for requests to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from simpletuner.training.gradient_sum import inner_nodes, make_buckets
from simpletuner.training.memory_plan.fake_step import StepMeasurement
from simpletuner.training.memory_plan.world_layout import ITEM_BYTES, WeightBytes, WorldLayout
from simpletuner.training.world import World

# What one GPU sends for a byte of the message, with N processes on a ring
# (Thakur et al. 2005, Optimization of Collective Communication Operations in MPICH).
SENT_PER_BYTE: dict[str, Callable[[int], float]] = {
    "all_gather": lambda count: (count - 1) / count,
    "reduce_scatter": lambda count: (count - 1) / count,
    "all_reduce": lambda count: 2 * (count - 1) / count,
    "broadcast": lambda count: 1.0,
    "send": lambda count: 1.0,
}


@dataclass(frozen=True)
class CollectiveUse:
    """The use of one operation of torch.distributed in an optimizer step.

    calls: how often; a send counts once for the two processes that it connects. None where an
    engine decides: DeepSpeed gathers module by module, and several at once where it gathers ahead.
    message_bytes: of all calls; the gathered size of an all_gather, the size before it of a
    reduce_scatter. sent_bytes: the most that one GPU sends.
    """

    operation: str
    calls: int | None
    message_bytes: int
    sent_bytes: int


def step_communication(
    layout: WorldLayout,
    weights: WeightBytes,
    measured: StepMeasurement,
    passes: int,
    is_lora: bool,
    more_forwards: int = 0,
) -> tuple[CollectiveUse, ...]:
    """Return what is exchanged in an optimizer step.

    passes: micro-batches of each process. more_forwards: forward passes without gradient in each.
    """
    if layout.processes == 1:
        return ()
    trained_tensors, trained = measured.trained_tensors, measured.trained_bytes
    uses: list[CollectiveUse] = []
    if layout.shards("weights"):
        # Units are gathered for the forward and the backward pass, the rest once for both.
        # DeepSpeed keeps what it gathers for the backward pass if all of it may be there at once.
        reshards = layout.reshards and weights.sharded > layout.live_bytes
        times, rest_times = (2 if reshards else 1) + more_forwards, 1 + more_forwards
        gathered = times * sum(weights.units) + rest_times * weights.rest
        if is_lora and layout.uses_deepspeed:
            gathered += times * trained
        calls = (
            None if layout.uses_deepspeed else (times * len(weights.units) + rest_times) * passes
        )
        uses.append(_use("all_gather", calls, gathered * passes, layout))
    if is_lora and not layout.uses_deepspeed:
        return (*uses, *tree_communication(layout, trained_tensors, passes))
    # DeepSpeed's buckets are counted in numbers, which bucket_bytes holds as bf16.
    limit = layout.bucket_bytes // ITEM_BYTES * measured.item_bytes
    buckets = count_buckets(trained_tensors, limit)
    if layout.mode == "replicated":
        uses.append(_use("all_reduce", buckets, trained, layout))
    elif layout.mode == "sharded":
        uses.append(
            _use("reduce_scatter", measured.trained_units * passes, trained * passes, layout)
        )
    elif layout.mode == "zero3":
        summed = trained * layout.gradient_factor
        uses.append(_use("reduce_scatter", buckets * passes, summed * passes, layout))
    else:
        # DeepSpeed sums whole buckets and keeps its part of them (allreduce_and_scatter). With
        # stage 2 no process holds all gradients, so every pass sums its own.
        times = 1 if layout.mode == "zero1" else passes
        summed = trained * layout.gradient_factor
        uses.append(_use("all_reduce", buckets * times, summed * times, layout))
        uses.append(_use("all_gather", max(1, trained // (limit or trained)), trained, layout))
    return tuple(uses)


def tree_communication(
    layout: WorldLayout, trained_tensors: Sequence[int], passes: int
) -> tuple[CollectiveUse, ...]:
    """Return the transfers that sum the gradients of adapters in a fixed tree.

    Before each transfer goes a mask of one byte per parameter.
    """
    count, micro_batches = layout.processes, layout.processes * passes
    owner = [
        rank for rank, share in enumerate(World(size=count).shares(micro_batches)) for _ in share
    ]
    senders = [
        owner[node.middle]
        for node in inner_nodes(0, micro_batches)
        if owner[node.first] != owner[node.middle]
    ]
    messages = 1 + count_buckets(trained_tensors)
    size = sum(trained_tensors) + len(trained_tensors)
    most = max((senders.count(rank) for rank in set(senders)), default=0)
    return (
        CollectiveUse("send", len(senders) * messages, len(senders) * size, most * size),
        _use("broadcast", messages, size, layout),
    )


def count_buckets(tensors: Sequence[int], limit: int | None = None) -> int:
    """Return in how many transfers gradients of these sizes in bytes are sent.

    limit: bytes of a transfer, where an engine has another than gradient_sum.py.
    """
    stand_ins = [torch.empty(size, dtype=torch.uint8, device="meta") for size in tensors]
    return sum(1 for _ in make_buckets(stand_ins, limit))


def _use(operation: str, calls: int | None, size: int, layout: WorldLayout) -> CollectiveUse:
    sent = SENT_PER_BYTE[operation](layout.processes)
    return CollectiveUse(operation, calls, size, int(size * sent))


def sent_bytes(uses: Sequence[CollectiveUse]) -> int:
    """Return the most that one GPU sends in a step."""
    return sum(use.sent_bytes for use in uses)
