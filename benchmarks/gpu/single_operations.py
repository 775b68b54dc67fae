"""Single operations: dequantised weights, 8-bit products, an optimizer's step over a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.comparison import relative_error
from benchmarks.gpu.random_weights import RandomChroma
from benchmarks.gpu.simpletuner_step import LORA
from benchmarks.gpu.timing import count_kernels, time_call, time_repeated_call
from benchmarks.gpu.workload import Workload
from torch import Tensor, nn

from simpletuner.config.schema import OptimizerOptions
from simpletuner.models.chroma.weights import empty_transformer
from simpletuner.quantization.quantized_linear import QuantizedLinear
from simpletuner.quantization.schemes import get_scheme
from simpletuner.training.optimizer_step import clip_gradients
from simpletuner.training.optimizers import build_optimizer

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_PRODUCT_TOLERANCE = 5e-2  # of a product of random numbers; float8 has 3 bits of fraction
INT8_MIN_ROWS = 17  # torch._int_mm refuses fewer


def measure_dequantisation(workload: Workload, scheme: str) -> Outcome:
    """Time quantising and dequantising a weight, alone, compiled, and inside a linear."""
    torch.manual_seed(0)
    device = workload.device
    rows, columns = workload.weight
    chosen = get_scheme(scheme)
    plain = nn.Linear(columns, rows, dtype=torch.bfloat16, device=device).requires_grad_(False)
    quantized = QuantizedLinear.from_linear(plain, scheme)
    buffers = chosen.quantize(plain.weight)
    tokens = columns * 4 // 3
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device=device, requires_grad=True)
    compiled = torch.compile(chosen.dequantize, backend=workload.backend, dynamic=False)
    calls: dict[str, Callable[[], Any]] = {
        "quantise": lambda: chosen.quantize(plain.weight),
        "dequantise": lambda: chosen.dequantize(buffers, columns, torch.bfloat16),
        "dequantise_compiled": lambda: compiled(buffers, columns, torch.bfloat16),
        "copy": lambda: plain.weight.clone(),
        "linear": lambda: quantized(x).sum().backward(),
        "plain_linear": lambda: plain(x).sum().backward(),
    }
    figures = {f"{name}_s": time_repeated_call(call, workload) for name, call in calls.items()}
    figures |= {
        "weights": rows * columns,
        "bytes": chosen.size_bytes(rows, columns),
        "tokens": tokens,
    }
    equal = torch.equal(calls["dequantise_compiled"](), calls["dequantise"]())
    return Outcome(figures, () if equal else ("compiled and plain dequantisation differ",))


def quantise_rows_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return float8 codes and the scale of each row, (rows, 1) float32."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / FP8_MAX
    return (x / scale).to(FP8), scale


def measure_fp8_product(workload: Workload) -> Outcome:
    """Time torch._scaled_mm with scales per row, and _int_mm, in comparison to bf16."""
    torch.manual_seed(0)
    rows, inner, columns = workload.product
    x = torch.randn(rows, inner, dtype=torch.bfloat16, device=workload.device)
    weight = torch.randn(columns, inner, dtype=torch.bfloat16, device=workload.device)
    x_codes, x_scale = quantise_rows_to_fp8(x)
    weight_codes, weight_scale = quantise_rows_to_fp8(weight)

    def product(codes: Tensor, scale: Tensor) -> Tensor:
        # The second operand must be column-major; a transposed weight (out, in) is.
        return torch._scaled_mm(
            codes, weight_codes.t(), scale, weight_scale.t(), out_dtype=torch.bfloat16
        )

    calls: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: x @ weight.t(),
        "fp8": lambda: product(x_codes, x_scale),
        "fp8_with_cast": lambda: product(*quantise_rows_to_fp8(x)),
    }
    error = relative_error(calls["fp8"](), calls["bf16"]())
    figures: dict[str, Any] = {"error": error, "tolerance": FP8_PRODUCT_TOLERANCE}
    if rows >= INT8_MIN_ROWS:
        x_int, weight_int = (
            (tensor * 16).round().clamp(-127, 127).to(torch.int8) for tensor in (x, weight)
        )
        calls["int8"] = lambda: torch._int_mm(x_int, weight_int.t())
    operations = 2 * rows * inner * columns
    for name, call in calls.items():
        figures[f"{name}_flops"] = operations / time_repeated_call(call, workload)
    failures = ()
    if not error <= FP8_PRODUCT_TOLERANCE:
        failures = (f"the relative error of the fp8 product is {error:.2e}",)
    return Outcome(figures, failures)


def measure_optimizer_step(workload: Workload, optimizer: str) -> Outcome:
    """Time clipping and one step over the tensors of a LoRA on all linears; no network."""
    torch.manual_seed(0)
    trained = lora_parameters(workload)
    options = OptimizerOptions(optimizer=optimizer)
    built = build_optimizer(options, trained, seed=0)
    parameters = [parameter for _, parameter in trained]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)

    def step() -> None:
        built.step()

    def clip() -> None:
        clip_gradients(parameters, options)

    figures = {"first_s": time_call(step, workload.device), "tensors": len(parameters)}
    for name, call in (("step", step), ("clip", clip)):
        seconds = min(time_call(call, workload.device) for _ in range(3))
        profiled = count_kernels(call, workload.device, seconds)
        figures |= {
            f"{name}_s": seconds,
            f"{name}_kernels": profiled["kernels"],
            f"{name}_idle_share": profiled["idle_share"],
        }
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in parameters)
    return Outcome(figures, () if finite else ("parameters are not finite after the steps",))


def lora_parameters(workload: Workload) -> list[tuple[str, nn.Parameter]]:
    """Return parameters of the shapes of a LoRA on all linears of the blocks."""
    network = empty_transformer(workload.config)
    target = str(LORA["flux_lora_target"])
    rank = int(LORA["lora_rank"])
    parameters = []
    for name in RandomChroma(workload.config).lora_targets(network, target):
        linear = network.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shapes = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
        for part, shape in shapes.items():
            value = torch.randn(shape, device=workload.device) * 0.01
            parameters.append((f"{name}.{part}", nn.Parameter(value)))
    return parameters
