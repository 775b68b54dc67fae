"""What each optimizer keeps and needs at full rank: bytes of state, highest extra bytes of a step, time.

    python benchmarks/optimizers.py                      # one JSON line per optimizer, bf16 weights
    python benchmarks/optimizers.py --dtype float32 --width 1024 --repeats 5

The network is one single block of Chroma at `width` (the model's is 3072), with gradients of its size. Extra
is the allocator's highest sum beyond weights, gradients and states during a step, as a share of the weights';
adamw_bf16 and adamw_8bit work on 4 M numbers at a time, so theirs stays below 0.14 and 0.22 GB at any size.
Released is the highest sum of gradients in a backward pass with optimizer_release_gradients, as a share of
all. Seconds are of the process's CPU, one thread, the least of `repeats`, in nanoseconds per weight.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from simpletuner.config.schema import OptimizerOptions
from simpletuner.training.optimizer_step import OptimizerStep, make_optimizer_step
from simpletuner.training.optimizers import OPTIMIZERS, build_optimizer

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


def one_step(update: OptimizerStep, layers: nn.ModuleList, width: int, dtype: torch.dtype) -> None:
    update.backward(loss_of(layers, width, dtype))
    update.clip_gradients()
    update.apply()
    update.zero_grad()


def measure(name: str, width: int, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    layers = block(width, dtype)
    params = list(layers.parameters())
    weights = sum(param.numel() for param in params)
    options = OptimizerOptions(optimizer=name, max_grad_norm=0)
    optimizer = build_optimizer(options, list(layers.named_parameters()), seed=0)
    update = make_optimizer_step("standard", params, optimizer, options)
    one_step(update, layers, width, dtype)  # the states are there
    state = sum(
        value.nbytes
        for values in optimizer.state.values()
        for value in values.values()
        if torch.is_tensor(value)
    )
    update.backward(loss_of(layers, width, dtype))
    extra = peak_bytes(update.apply)
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        update.apply()
        seconds.append(time.process_time() - started)
    update.zero_grad()
    size = sum(param.nbytes for param in params)
    return {
        "optimizer": name, "dtype": str(dtype).removeprefix("torch."), "weights": weights,
        "state_bytes_per_weight": round(state / weights, 3), "extra": round(extra / size, 3),
        "ns_per_weight": round(min(seconds) / weights * 1e9, 2), **released(name, width, dtype),
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
    one_step(make_optimizer_step("in_backward", params, optimizer, options), layers, width, dtype)
    return {"released": round(max(live) / sum(param.nbytes for param in params), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[arguments.dtype]
    for name in OPTIMIZERS:
        print(json.dumps(measure(name, arguments.width, dtype, arguments.repeats)), flush=True)


if __name__ == "__main__":
    main()
