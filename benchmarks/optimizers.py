"""What each optimizer needs at full rank: bytes of state, extra bytes of a step, time.

    python -m benchmarks.optimizers                    # one JSON line per optimizer, bf16 weights
    python -m benchmarks.optimizers --dtype float32 --width 1024 --pairs 15

The network is one single block of Chroma at `width` (the model's is 3072), with gradients of its
size. Extra is the allocator's highest sum beyond weights, gradients and states during a step, as a
share of the weights'; adamw_bf16 and adamw_8bit work on 4 M numbers at a time, so theirs stays
below 0.16 and 0.23 GB at any size. Released is the highest sum of gradients in a backward pass
with optimizer_release_gradients, as a share of all. A step's time is CPU time of the process, one
thread: the median in nanoseconds per weight, and the ratio to torch's own AdamW on the same
gradients (the row `adamw` compares it with itself, which shows what the method can tell apart),
the median of the pairs with its quartiles (benchmarks/paired.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from benchmarks.paired import add_pairs, compare, environment
from torch import Tensor, nn

from simpletuner.config.schema import OptimizerOptions
from simpletuner.training.gradient_sum import GradientSum
from simpletuner.training.optimizer_step import OptimizerStep, make_optimizer_step
from simpletuner.training.optimizers import OPTIMIZERS, build_optimizer
from simpletuner.training.world import World

UNRELEASED = ("prodigy",)


def block(width: int, dtype: torch.dtype) -> nn.ModuleList:
    """The matrices and vectors of a single block, without what lies between them."""
    sizes = [(width, width)] * 3 + [(width, 4 * width), (5 * width, width)]
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(*size, dtype=dtype) for size in sizes])


def loss_of(layers: nn.ModuleList, width: int, dtype: torch.dtype) -> Tensor:
    x = torch.ones(2, width, dtype=dtype)
    *narrow, wide, last = layers
    for layer in narrow:
        x = x + layer(x)
    return last(torch.cat([x, wide(x)], 1)).float().square().mean()


def peak_bytes(act: Callable[[], object]) -> int:
    """Highest sum of what torch's CPU allocator gave out and has not got back while `act` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        act()
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def make_step(
    name: str,
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    options: OptimizerOptions,
) -> OptimizerStep:
    return make_optimizer_step(name, params, optimizer, options, GradientSum(params, World()))


def one_step(update: OptimizerStep, layers: nn.ModuleList, width: int, dtype: torch.dtype) -> None:
    update.backward(loss_of(layers, width, dtype), 0)
    update.clip_gradients()
    update.apply()
    update.zero_grad()


def prepare(
    name: str, layers: nn.ModuleList, width: int, dtype: torch.dtype
) -> tuple[torch.optim.Optimizer, OptimizerStep]:
    """Return the optimizer after one step, so that its states are there."""
    options = OptimizerOptions(optimizer=name, max_grad_norm=0)
    optimizer = build_optimizer(options, list(layers.named_parameters()), seed=0)
    update = make_step("standard", list(layers.parameters()), optimizer, options)
    one_step(update, layers, width, dtype)
    return optimizer, update


def measure(name: str, width: int, dtype: torch.dtype, pairs: int) -> dict[str, object]:
    layers = block(width, dtype)
    params = list(layers.parameters())
    weights = sum(param.numel() for param in params)
    optimizer, update = prepare(name, layers, width, dtype)
    state = sum(
        value.nbytes
        for values in optimizer.state.values()
        for value in values.values()
        if torch.is_tensor(value)
    )
    update.backward(loss_of(layers, width, dtype), 0)
    extra = peak_bytes(update.apply)
    reference_layers = block(width, dtype)
    _, reference = prepare("adamw", reference_layers, width, dtype)
    reference.backward(loss_of(reference_layers, width, dtype))
    found = compare(update.apply, reference.apply, pairs).cpu()
    update.zero_grad()
    size = sum(param.nbytes for param in params)
    return {
        "optimizer": name, "dtype": str(dtype).removeprefix("torch."), "weights": weights,
        "state_bytes_per_weight": round(state / weights, 3), "extra": round(extra / size, 3),
        "ns_per_weight": round(found["ours_s"] / weights * 1e9, 2),
        **{key: found[key] for key in ("pairs", "ratio", "ratio_q1", "ratio_q3")},
        **released(name, width, dtype), **environment(),
    }  # fmt: skip


def released(name: str, width: int, dtype: torch.dtype) -> dict[str, float]:
    """The highest sum of live gradients, as the steps inside the backward pass find it."""
    if name in UNRELEASED:
        return {}
    layers = block(width, dtype)
    params = list(layers.parameters())
    options = OptimizerOptions(optimizer=name, max_grad_norm=0, optimizer_release_gradients=True)
    optimizer = build_optimizer(options, list(layers.named_parameters()), seed=0)
    live: list[int] = []
    optimizer.register_step_pre_hook(
        lambda *_: live.append(sum(param.grad.nbytes for param in params if param.grad is not None))
    )
    one_step(make_step("in_backward", params, optimizer, options), layers, width, dtype)
    return {"released": round(max(live) / sum(param.nbytes for param in params), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--width", type=int, default=512)
    add_pairs(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[arguments.dtype]
    for name in OPTIMIZERS:
        print(json.dumps(measure(name, arguments.width, dtype, arguments.pairs)), flush=True)


if __name__ == "__main__":
    main()
