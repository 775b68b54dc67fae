"""What the CPU's allocator hands out while something runs: tensors, and kernels' scratch memory.

How much scratch memory a kernel takes depends on the CPU: with AMX, attention packs its keys and
values anew. A plan counts tensors, so this tells the two apart by when they are freed: scratch
memory within the operation that allocated it, a tensor after it.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch._C._profiler import _EventType, _ProfilerEvent, _RecordFunctionFast
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

MARK = "operation "


@dataclass(frozen=True)
class Allocated:
    """tensors: bytes at the highest moment of what outlived the operation that allocated it.

    scratch: the most bytes that one call of an operation took and freed again, by its name.
    """

    tensors: int
    scratch: dict[str, int]


class Operations(TorchDispatchMode):
    """Marks each operation in the profile, at the level at which the plan sees operations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _RecordFunctionFast(f"{MARK}{func}"):  # record_function is an operation itself
            return func(*args, **(kwargs or {}))


def allocated(act: Callable[[], None]) -> Allocated:
    """Run `act` and return what it took. Memory allocated before does not count, even if freed."""
    torch.manual_seed(0)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, Operations():
        act()
    kineto = profiled.profiler
    assert kineto is not None
    results = kineto.kineto_results
    assert results is not None
    return divided(allocations(results.experimental_event_tree()))


def allocations(roots: Sequence[_ProfilerEvent]) -> list[_ProfilerEvent]:
    """Return the events that allocate or free, in order of time."""
    found, rest = [], [*reversed(roots)]
    while rest:
        event = rest.pop()
        rest += reversed(event.children)
        if event.typed[0] == _EventType.Allocation:
            assert event.typed[1].device == torch.device("cpu")
            found.append(event)
    return sorted(found, key=lambda event: event.start_time_ns)


def operation(event: _ProfilerEvent) -> _ProfilerEvent | None:
    """Return the marked operation that an event belongs to; None between operations."""
    outer: _ProfilerEvent | None = event
    while outer is not None and not outer.name.startswith(MARK):
        outer = outer.parent
    return outer


def divided(events: Iterable[_ProfilerEvent]) -> Allocated:
    """Return the peak of the tensors and the scratch memory beside it."""
    changes: list[int] = []  # of the tensors' bytes, in order; 0 for scratch memory
    pending: dict[int, tuple[int, _ProfilerEvent | None]] = {}  # by address: change, operation
    taken: dict[tuple[str, int], int] = defaultdict(int)  # scratch memory by operation and call
    for event in events:
        size, address, call = event.typed[1].alloc_size, event.typed[1].ptr, operation(event)
        if size > 0:
            assert address not in pending
            pending[address] = (len(changes), call)
            changes.append(size)
        elif address in pending:
            at, allocating = pending.pop(address)
            if call is not None and allocating is not None and call.id == allocating.id:
                taken[call.name.removeprefix(MARK), call.id] += changes[at]
                changes[at] = 0
            else:
                changes.append(size)
    scratch: dict[str, int] = defaultdict(int)
    for (name, _), total in taken.items():
        scratch[name] = max(scratch[name], total)
    return Allocated(max(accumulate(changes), default=0), dict(scratch))
