"""How fast a scheme's weights are restored, alone and inside a linear, plain and compiled."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu.cases import Case, World
from benchmarks.gpu.meter import clocked
from torch import nn

from simpletuner.quantization.linear import QuantizedLinear
from simpletuner.quantization.schemes import named

ROUNDS, EACH = 5, 10  # the median of rounds; so many calls in one, for launches take as long as small kernels


def seconds(work: Callable[[], object], device: torch.device, world: World) -> float:
    """Of one call."""
    each = EACH if device.type == "cuda" else 1

    def calls() -> None:
        for _ in range(each):
            work()

    for _ in range(world.warm_up):
        work()
    return statistics.median(clocked(calls, device) for _ in range(ROUNDS)) / each


def measure(case: Case, world: World) -> dict[str, Any]:
    torch.manual_seed(0)
    device, scheme, (rows, columns) = torch.device(world.device), named(case.precision), world.weight
    plain = nn.Linear(columns, rows, dtype=torch.bfloat16, device=device).requires_grad_(False)
    quantized = QuantizedLinear.of(plain, case.precision)
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
    taken = {f"{name}_s": seconds(work, device, world) for name, work in by.items()}
    exact = torch.equal(by["restore_compiled"](), by["restore"]())
    return {
        **taken, "weights": rows * columns, "tokens": len(x),
        "bytes": scheme.size_bytes(rows, columns), "compiled_is_equal": exact,
    }  # fmt: skip
