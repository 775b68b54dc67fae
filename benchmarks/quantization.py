"""What each scheme costs in precision and time, layer by layer.

    python benchmarks/quantization.py [--threads 1] [--full-width]

One table. Error: root of the mean square error over that of the weights, and the same of a layer's output
for Gaussian inputs; for Gaussian weights with a few outliers and for every block linear of the bundled nano
(the mean over its layers, and the worst). Speed: million weights per CPU second to quantise and to restore,
and a forward and backward of a linear against bfloat16's own (a LoRA's base: gradient of the input alone), as
ratios of process CPU time taken in turns, the best of five. --full-width: layers of 3072 x 12288 as in Chroma
instead of 1024 x 3072.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import simpletuner.models as models_package
from simpletuner.models.chroma.weights import block_linears, load_transformer
from simpletuner.quantization.quantized_linear import QuantizedLinear
from simpletuner.quantization.schemes import SCHEMES

ROUNDS = 5
TOKENS = 384
ROW = "{:<6} {:>8} {:>9} {:>10} {:>9} {:>12} {:>9} {:>10} {:>7}"


def gaussian(rows: int, columns: int) -> Tensor:
    weight = torch.randn(rows, columns) * 0.02 * (0.5 + torch.rand(rows, 1))
    weight[torch.rand(rows, columns) < 1e-4] *= 8
    return weight.bfloat16()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def errors(scheme: str, weight: Tensor) -> tuple[float, float]:
    """Of the weight and of x W^T."""
    weight = weight.float()
    restored = SCHEMES[scheme].dequantize(SCHEMES[scheme].quantize(weight), weight.shape[1], torch.float32)
    x = torch.randn(64, weight.shape[1])
    return relative(restored, weight), relative(x @ restored.t(), x @ weight.t())


def cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def step(linear: nn.Module, x: Tensor) -> None:
    linear(x).backward(torch.ones(1, dtype=x.dtype).expand(TOKENS, linear.get_parameter("bias").shape[0]))


def speed(scheme: str, weight: Tensor) -> tuple[float, float, float]:
    """Million weights per second quantised, restored; time of a forward and backward over bfloat16's."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.bfloat16).requires_grad_(False)
    plain.weight.copy_(weight)
    quantized = QuantizedLinear.from_linear(plain, scheme)
    x = torch.randn(TOKENS, weight.shape[1], dtype=torch.bfloat16, requires_grad=True)
    rounds = [
        (
            cpu_s(lambda: SCHEMES[scheme].quantize(weight)),
            cpu_s(lambda: quantized.weight),
            cpu_s(lambda: step(quantized, x)),
            cpu_s(lambda: step(plain, x)),
        )
        for _ in range(ROUNDS)
    ]
    quantise_s, restore_s, ours_s, plain_s = (min(column) for column in zip(*rounds, strict=True))
    million = weight.numel() / 1e6
    return million / quantise_s, million / restore_s, ours_s / plain_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full-width", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    weight = gaussian(*((3072, 12288) if arguments.full_width else (1024, 3072)))
    nano = load_transformer(
        Path(models_package.__path__[0]) / "nano" / "transformer", torch.device("cpu"), torch.float32
    )
    layers = [nano.get_submodule(name).get_parameter("weight") for name in block_linears(nano)]
    print(
        f"{tuple(weight.shape)}, {TOKENS} tokens, {arguments.threads} thread(s); nano: {len(layers)} layers"
    )
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
        into, back, ratio = speed(scheme, weight)
        own, output = of_weight[scheme]
        means = sum(one for one, _ in of_nano[scheme]) / len(layers)
        worst = max(one for one, _ in of_nano[scheme])
        cells = (f"{table.size_bytes(*weight.shape) / weight.numel():.4f}", f"{own:.4f}", f"{output:.4f}",
                 f"{means:.4f}", f"{worst:.4f}", f"{into:.0f}", f"{back:.0f}", f"{ratio:.2f}x")  # fmt: skip
        print(ROW.format(scheme, *cells))


if __name__ == "__main__":
    main()
