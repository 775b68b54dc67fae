"""How fast a scheme's weights are restored, alone and inside a linear, plain and compiled."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu.cases import Case, SuiteSize
from benchmarks.gpu.step_meter import time_call
from torch import nn

from simpletuner.quantization.quantized_linear import QuantizedLinear
from simpletuner.quantization.schemes import get_scheme

ROUNDS, CALLS_PER_ROUND = (
    5,
    10,
)  # the median of rounds; so many calls in one, for launches take as long as small kernels


def seconds_per_call(work: Callable[[], object], device: torch.device, world: SuiteSize) -> float:
    """Of one call."""
    each = CALLS_PER_ROUND if device.type == "cuda" else 1

    def calls() -> None:
        for _ in range(each):
            work()

    for _ in range(world.warm_up):
        work()
    return statistics.median(time_call(calls, device) for _ in range(ROUNDS)) / each


def measure(case: Case, world: SuiteSize) -> dict[str, Any]:
    torch.manual_seed(0)
    device, scheme, (rows, columns) = (
        torch.device(world.device),
        get_scheme(case.precision),
        world.weight_shape,
    )
    plain = nn.Linear(columns, rows, dtype=torch.bfloat16, device=device).requires_grad_(False)
    quantized = QuantizedLinear.from_linear(plain, case.precision)
    parts = scheme.quantize(plain.weight)
    x = torch.randn(columns * 4 // 3, columns, dtype=torch.bfloat16, device=device, requires_grad=True)
    compiled = torch.compile(scheme.dequantize, backend=world.backend, dynamic=False)
    by = {
        "quantise": lambda: scheme.quantize(plain.weight),
        "restore": lambda: scheme.dequantize(parts, columns, torch.bfloat16),
        "restore_compiled": lambda: compiled(parts, columns, torch.bfloat16),
        "copy": lambda: plain.weight.clone(),
        "linear": lambda: quantized(x).sum().backward(),
        "plain_linear": lambda: plain(x).sum().backward(),
    }
    taken = {f"{name}_s": seconds_per_call(work, device, world) for name, work in by.items()}
    exact = torch.equal(by["restore_compiled"](), by["restore"]())
    return {
        **taken, "weights": rows * columns, "tokens": len(x),
        "bytes": scheme.size_bytes(rows, columns), "compiled_is_equal": exact,
    }  # fmt: skip
