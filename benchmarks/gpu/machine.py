"""The machine: versions and properties that figures depend on, and the rates it reaches."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.timing import time_repeated_call
from benchmarks.gpu.workload import Workload

LIBRARIES = (
    "torch",
    "triton",
    "diffusers",
    "peft",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "pydantic",
    "torch-optimi",
    "prodigyopt",
    "schedulefree",
)
SQUARE = 8192
TOY_SQUARE = 64
COPIED_BYTES = 4 << 30  # many times the GPU's cache
TOY_COPIED_BYTES = 1 << 16


def installed_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def list_versions(workload: Workload) -> Outcome:
    """List the versions of libraries and the properties of the device."""
    figures: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "gpu": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "libraries": {library: installed_version(library) for library in LIBRARIES},
    }
    if workload.on_gpu:
        properties = torch.cuda.get_device_properties(workload.device)
        free, total = torch.cuda.mem_get_info(workload.device)
        figures |= {
            "gpu": properties.name,
            "gpu_bytes": total,
            "free_bytes": free,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
        }
    return Outcome(figures)


def measure_rates(workload: Workload) -> Outcome:
    """Measure FLOP/s of bf16 products of random numbers and bytes/s of copies."""
    device = workload.device
    side = TOY_SQUARE if workload.toy else SQUARE
    figures: dict[str, Any] = {}
    for name, shape in (("square", (side, side, side)), ("step", workload.product)):
        rows, inner, columns = shape
        a = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
        b = torch.randn(columns, inner, dtype=torch.bfloat16, device=device)
        seconds = time_repeated_call(lambda: a @ b.t(), workload)  # noqa: B023
        figures[f"{name}_flops"] = 2 * rows * inner * columns / seconds
        figures[f"{name}_shape"] = list(shape)
    size = TOY_COPIED_BYTES if workload.toy else COPIED_BYTES
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    part = source[: size // 4]
    host = torch.empty(len(part), dtype=torch.uint8, pin_memory=workload.on_gpu)
    copies = {
        "copy": (2 * size, lambda: target.copy_(source)),  # bytes that are read and written
        "to_device": (len(part), lambda: part.copy_(host, non_blocking=True)),
        "to_host": (len(part), lambda: host.copy_(part, non_blocking=True)),
    }
    for name, (moved, copy) in copies.items():
        figures[f"{name}_bytes_s"] = moved / time_repeated_call(copy, workload)
    return Outcome(figures)
