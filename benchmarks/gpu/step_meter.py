"""Time and memory of a step: warm-up, then a synchronised clock and the allocator's own peaks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu.cases import SuiteSize

MAX_TIMED_STEPS = 20


def reset_device(device: torch.device) -> int:
    """Forget what an earlier case left; bytes that are allocated nevertheless."""
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


def time_call(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def memory_peaks(device: torch.device) -> dict[str, int]:
    """Bytes since the last reset. used: of the whole device, with the driver's context."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "used": total - free,
    }


def measure_step(step: Callable[[], float], world: SuiteSize, device: torch.device) -> dict[str, Any]:
    """step: one optimizer step, gives its loss. first_s holds compilation; first_peak optimizer states being
    made. The rest is of the timed steps alone; the allocator's cache is emptied before them, so that what is
    reserved is theirs.
    """
    if device.type == "cuda":  # what making the weights took is not the step's
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    losses: list[float] = []

    def one() -> None:
        losses.append(step())

    first_s = time_call(one, device)
    first_peak = memory_peaks(device)
    for _ in range(world.warm_up - 1):
        time_call(one, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        time_call(one, device)  # fills the allocator's cache again, untimed
    times: list[float] = []
    while len(times) < world.steps or (sum(times) < world.min_seconds and len(times) < MAX_TIMED_STEPS):
        times.append(time_call(one, device))
    return {
        "step_s": statistics.median(times), "least_s": min(times), "steps": len(times), "first_s": first_s,
        "first_peak": first_peak, "peak": memory_peaks(device), "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip
