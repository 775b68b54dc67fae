"""What each scheme costs in precision and time, layer by layer.

    python -m benchmarks.quantization [--threads 1] [--full-width] [--pairs 7]

One table. Error: root of the mean square error over that of the weights, and the same of a layer's
output for Gaussian inputs; for Gaussian weights with a few outliers and for every block linear of
the bundled nano (the mean over its layers, and the worst). Speed: million weights per CPU second
to quantise and to restore, and a forward and backward of a linear against bfloat16's own (a LoRA's
base: gradient of the input alone) as the ratio of CPU times, the median of the pairs with its
quartiles (benchmarks/paired.py). --full-width: layers of 3072 x 12288 as in Chroma instead of 1024
x 3072.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.paired import add_pairs, compare, environment, time_call
from torch import Tensor, nn

import simpletuner.models as models_package
from simpletuner.models.chroma.weights import block_linears, load_transformer
from simpletuner.quantization.quantized_linear import QuantizedLinear
from simpletuner.quantization.schemes import SCHEMES

TOKENS = 384
ROW = "{:<6} {:>8} {:>9} {:>10} {:>9} {:>12} {:>9} {:>10} {:>20}"


def gaussian(rows: int, columns: int) -> Tensor:
    weight = torch.randn(rows, columns) * 0.02 * (0.5 + torch.rand(rows, 1))
    weight[torch.rand(rows, columns) < 1e-4] *= 8
    return weight.bfloat16()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def errors(scheme: str, weight: Tensor) -> tuple[float, float]:
    """Of the weight and of x W^T."""
    weight = weight.float()
    restored = SCHEMES[scheme].dequantize(
        SCHEMES[scheme].quantize(weight), weight.shape[1], torch.float32
    )
    x = torch.randn(64, weight.shape[1])
    return relative(restored, weight), relative(x @ restored.t(), x @ weight.t())


def cpu_s(work: Callable[[], object], repeats: int) -> float:
    """Return the median CPU seconds of `repeats` calls."""
    return statistics.median(time_call(work).cpu_s for _ in range(repeats))


def step(linear: nn.Module, x: Tensor) -> None:
    linear(x).backward(
        torch.ones(1, dtype=x.dtype).expand(TOKENS, linear.get_parameter("bias").shape[0])
    )


def speed(scheme: str, weight: Tensor, pairs: int) -> tuple[float, float, dict[str, float]]:
    """Return million weights quantised and restored per second, and the step's comparison."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.bfloat16).requires_grad_(False)
    plain.weight.copy_(weight)
    quantized = QuantizedLinear.from_linear(plain, scheme)
    x = torch.randn(TOKENS, weight.shape[1], dtype=torch.bfloat16, requires_grad=True)
    million = weight.numel() / 1e6
    return (
        million / cpu_s(lambda: SCHEMES[scheme].quantize(weight), pairs),
        million / cpu_s(lambda: quantized.weight, pairs),
        compare(lambda: step(quantized, x), lambda: step(plain, x), pairs).cpu(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full-width", action="store_true")
    add_pairs(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    weight = gaussian(*((3072, 12288) if arguments.full_width else (1024, 3072)))
    nano = load_transformer(
        Path(models_package.__path__[0]) / "nano" / "transformer",
        torch.device("cpu"),
        torch.float32,
    )
    layers = [nano.get_submodule(name).get_parameter("weight") for name in block_linears(nano)]
    facts = environment()
    print(
        f"{tuple(weight.shape)}, {TOKENS} tokens, {arguments.pairs} pairs; "
        f"nano: {len(layers)} layers"
    )
    print(f"torch {facts['torch']}, {facts['torch_threads']} thread(s), {facts['cpu_model']}")
    heads = (
        "scheme",
        "B/weight",
        "W error",
        "out error",
        "nano W",
        "nano worst",
        "in Mw/s",
        "out Mw/s",
        "step",
    )
    print(ROW.format(*heads))
    with torch.no_grad():
        of_nano = {scheme: [errors(scheme, layer) for layer in layers] for scheme in SCHEMES}
        of_weight = {scheme: errors(scheme, weight) for scheme in SCHEMES}
    for scheme, table in SCHEMES.items():
        into, back, found = speed(scheme, weight, arguments.pairs)
        ratio = f"{found['ratio']:.2f} [{found['ratio_q1']:.2f}, {found['ratio_q3']:.2f}]"
        own, output = of_weight[scheme]
        means = sum(one for one, _ in of_nano[scheme]) / len(layers)
        worst = max(one for one, _ in of_nano[scheme])
        cells = (
            f"{table.size_bytes(*weight.shape) / weight.numel():.4f}",
            f"{own:.4f}",
            f"{output:.4f}",
            f"{means:.4f}",
            f"{worst:.4f}",
            f"{into:.0f}",
            f"{back:.0f}",
            ratio,
        )
        print(ROW.format(scheme, *cells))


if __name__ == "__main__":
    main()
