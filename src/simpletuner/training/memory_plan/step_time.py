"""Estimate the seconds of a step from its floating-point operations."""

from __future__ import annotations

import time

import torch

# Dense bf16 TFLOP/s with fp32 accumulation, from data sheets. The first key that is part of the
# device's name is used.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "MI300X": 1307.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "6000 Ada": 364.0,
    "A6000": 155.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 4070": 58.3,
    "RTX 3090": 71.2,
    "RTX 3080": 59.5,
    "RTX 3060": 25.5,
}
# Matrix products reach 0.7 to 0.8 of the peak; memory-bound operations add a third.
UTILISATION = 0.5
REFERENCE_GPU = "RTX 4090"
PCIE_BYTES_PER_S = 20e9  # from pinned memory over PCIe 4.0 x16
# Part of the transfers that blocks wait for, because they compute faster or the direction changes.
EXPOSED_TRANSFER_FRACTION = 0.25
CPU_BENCHMARK_SHAPE = (256, 1024, 1024)  # half a GFLOP, too short to notice


def peak_flops(name: str) -> float | None:
    """Return the FLOP/s of a GPU by its name; None if it is not in the table."""
    return next((tera * 1e12 for known, tera in PEAK_TFLOPS.items() if known in name), None)


def measure_cpu_flops(dtype: torch.dtype) -> float:
    """Return the FLOP/s of this CPU, from the fastest of three matrix products in CPU time."""
    rows, inner, columns = CPU_BENCHMARK_SHAPE
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    times = []
    for _ in range(3):
        started = time.thread_time()
        a @ b
        times.append(time.thread_time() - started)
    return 2 * rows * inner * columns / max(min(times), 1e-9)


def estimate_seconds(flops: float, peak: float, moved: float = 0.0) -> float:
    """Return the seconds of a step. moved: bytes between host and device, mostly overlapped."""
    return (
        max(flops / (peak * UTILISATION), moved / PCIE_BYTES_PER_S)
        + EXPOSED_TRANSFER_FRACTION * moved / PCIE_BYTES_PER_S
    )
