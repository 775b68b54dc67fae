"""Time, memory and kernels of a step: synchronised clock, allocator peaks, profiler."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmarks.gpu.workload import Workload
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MAX_TIMED_STEPS = 20
TOP_KERNELS = 8
ROUNDS = 5
CALLS_PER_ROUND = 10
COPY_PREFIXES = ("Memcpy", "Memset")


def free_memory(device: torch.device) -> int:
    """Free what an earlier check left; return the bytes that are allocated nevertheless."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, including the work of the device."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def time_repeated_call(function: Callable[[], object], workload: Workload) -> float:
    """Return the seconds of one call, as the median of rounds of several calls.

    A single call would time the launch as much as a small kernel.
    """
    calls = CALLS_PER_ROUND if workload.on_gpu else 1

    def call_several_times() -> None:
        for _ in range(calls):
            function()

    for _ in range(workload.warm_up):
        function()
    rounds = [time_call(call_several_times, workload.device) for _ in range(ROUNDS)]
    return statistics.median(rounds) / calls


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return bytes since the last reset, on a GPU.

    allocated, reserved: of torch's allocator. used: of the whole device, with the driver's context.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "used": total - free,
    }


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def empty_compile_cache(workload: Workload, compiled: bool) -> Iterator[None]:
    """Hide everything that was compiled before, in this process or on disk."""
    if compiled and workload.backend == "inductor":
        from torch._inductor.utils import fresh_cache

        with fresh_cache():
            yield
    else:
        yield


def measure_steps(step: Callable[[], float], workload: Workload) -> dict[str, Any]:
    """Time a training step and count its memory and kernels.

    step: runs one optimizer step and returns its loss. first_s includes compilation, first_peak the
    creation of optimizer states. All other figures are of the timed steps. The allocator's cache is
    emptied before these, so that `reserved` counts what they need.
    """
    device = workload.device
    reset_peak_memory(device)  # generating the weights took memory that the step does not need
    losses: list[float] = []

    def run_step() -> None:
        losses.append(step())

    first_s = time_call(run_step, device)
    first_peak = peak_memory(device)
    for _ in range(workload.warm_up - 1):
        time_call(run_step, device)
    if workload.on_gpu:
        reset_peak_memory(device)
        time_call(run_step, device)  # fills the allocator's cache again; not timed
    times: list[float] = []
    while len(times) < workload.steps or (
        sum(times) < workload.seconds and len(times) < MAX_TIMED_STEPS
    ):
        times.append(time_call(run_step, device))
    step_s = statistics.median(times)
    peak = peak_memory(device)
    kernels = count_kernels(run_step, device, step_s)
    return {
        "step_s": step_s,
        "least_s": min(times),
        "steps": len(times),
        "first_s": first_s,
        "first_peak": first_peak,
        "peak": peak,
        **kernels,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def count_kernels(
    function: Callable[[], object], device: torch.device, usual_s: float
) -> dict[str, Any]:
    """Profile one call: kernels, copies, seconds in which a kernel ran, the longest kernels.

    usual_s: duration of a call without the profiler, which slows launches down; idle_share is the
    part of it in which no kernel ran. On a CPU operators are counted instead of kernels.
    """
    activity, device_type = ProfilerActivity.CPU, DeviceType.CPU
    if device.type == "cuda":
        activity, device_type = ProfilerActivity.CUDA, DeviceType.CUDA
    synchronize(device)
    with profile(activities=[activity]) as trace:
        function()
        synchronize(device)
    events = [
        event
        for event in trace.events()
        if event.device_type == device_type and not event.is_user_annotation
    ]
    kernels = [event for event in events if not event.name.startswith(COPY_PREFIXES)]
    spans = [(event.time_range.start, event.time_range.end) for event in kernels]
    busy_s = union_length(spans) / 1e6
    durations: Counter[str] = Counter()
    for event in kernels:
        durations[event.name[:80]] += event.time_range.end - event.time_range.start
    total = sum(durations.values()) or 1.0
    longest = durations.most_common(TOP_KERNELS)
    return {
        "kernels": len(kernels),
        "copies": len(events) - len(kernels),
        "busy_s": busy_s,
        "idle_share": max(0.0, 1 - busy_s / usual_s),
        "top_kernels": {name: round(duration / total, 4) for name, duration in longest},
    }


def union_length(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of (start, end) intervals."""
    length = 0.0
    reached = float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
