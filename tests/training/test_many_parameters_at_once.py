"""Optimizers that update many parameters in one operation: the numbers of one by one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import optimi
import prodigyopt
import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.config.schema import OptimizerOptions
from simpletuner.training import flat_parameters, gradient_sum
from simpletuner.training.independent_parameter_optimizer import IndependentParameterOptimizer
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from simpletuner.training.optimizers import build_optimizer
from simpletuner.training.stochastic_adamw import StochasticAdamW

SHAPES = [(4, 9), (7, 4), (7,), (300,), (16, 256), (5, 1000), (64, 64), (1,), (3, 4096)]


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    """Every second one is zero, as the factors B of a new LoRA are."""
    draw = torch.Generator().manual_seed(0)
    return [
        nn.Parameter((torch.randn(shape, generator=draw) * (number % 2)).to(dtype))
        for number, shape in enumerate(shapes)
    ]


def optimizer_of(name: str, params: list[nn.Parameter], config: str | None = None) -> Optimizer:
    options = OptimizerOptions(
        optimizer=name, learning_rate=0.01, optimizer_config=config, adam_weight_decay=0.01
    )
    return build_optimizer(options, [(str(i), param) for i, param in enumerate(params)], seed=3)


def train(optimizer: Optimizer, params: list[nn.Parameter], rate: float, steps: int = 7) -> None:
    """In each step another parameter has no gradient."""
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 + 0.1 * (step % 3))
        for number, param in enumerate(params):
            noise = 0.1 * torch.randn(param.shape, generator=draw)
            absent = step > 0 and (step + number) % 5 == 0
            param.grad = None if absent else ((param.detach() - 1).float() + noise).to(param.dtype)
        optimizer.step()


def equal_states(mine: Optimizer, other: Optimizer) -> bool:
    return all(
        torch.equal(value, other.state_dict()["state"][index][key])
        for index, state in mine.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    )


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bf16"])
def test_a_chunk_needs_about_nine_temporary_tensors(name: str) -> None:
    """Of float32 numbers: the highest moment of a training at full rank; 13 with 8-bit moments before."""
    params = parameters(torch.bfloat16, [(256, 1024)])
    params[0].grad = torch.ones_like(params[0])
    optimizer = optimizer_of(name, params)
    optimizer.step()
    count = MemoryTrackerMode(granule=1)
    with count:
        optimizer.step()
    assert count.peak_total_bytes <= 9.5 * 4 * params[0].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bf16"])
def test_groups_change_no_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and states, with padding, in several groups, and with parts of sharded parameters."""
    monkeypatch.setattr(flat_parameters, "GROUP_NUMBERS", 3 * 4096)
    grouped, single = parameters(dtype), parameters(dtype)
    first, second = optimizer_of(name, grouped), optimizer_of(name, single)
    for optimizer, params in ((first, grouped), (second, single)):
        assert isinstance(optimizer, IndependentParameterOptimizer)
        optimizer.first_number |= {params[4]: 256 * 19, params[6]: 4096}
    train(first, grouped, 0.01)
    monkeypatch.setattr(StochasticAdamW, "_is_small", lambda self, param: False)
    train(second, single, 0.01)
    assert all(map(torch.equal, grouped, single))
    assert equal_states(first, second)


class Operations(TorchDispatchMode):
    """Counts what is computed; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bf16", "lion", "adamw_schedulefree"])
def test_the_number_of_operations_does_not_depend_on_that_of_parameters(name: str) -> None:
    def operations(count: int) -> int:
        params = parameters(torch.float32, [(4, 64)] * count)
        optimizer = optimizer_of(name, params)
        train(optimizer, params, 0.01, steps=1)
        for param in params:
            param.grad = torch.ones_like(param)
        with Operations() as counted:
            optimizer.step()
        return counted.count

    assert operations(40) == operations(10) < 130


LIBRARIES: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "lion": lambda params: optimi.Lion(
        params, lr=0.01, betas=(0.9, 0.99), weight_decay=0.01, triton=False, foreach=False
    ),
    "adamw_schedulefree": lambda params: schedulefree.AdamWScheduleFree(
        params, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, foreach=False
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LIBRARIES)
def test_the_library_one_by_one_gives_the_same_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_sum, "BUCKET_BYTES", 4000)
    mine, theirs = parameters(dtype), parameters(dtype)
    optimizer, library = optimizer_of(name, mine), LIBRARIES[name](theirs)
    if name == "adamw_schedulefree":
        library.train()  # type: ignore[attr-defined]
    train(optimizer, mine, 0.01)
    train(library, theirs, 0.01)
    assert all(map(torch.equal, mine, theirs))
    assert equal_states(optimizer, library)
    groups = (optimizer.state_dict()["param_groups"][0], library.state_dict()["param_groups"][0])
    assert groups[0] == groups[1]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"slice_p": 3, "use_bias_correction": True, "safeguard_warmup": True, "d_coef": 2.0},
        {"decouple": False, "beta3": 0.9, "growth_rate": 1.5},
    ],
)
def test_prodigy_follows_the_library(
    config: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over parameters are rounded in another order, and d grows by powers at first."""
    monkeypatch.setattr(gradient_sum, "BUCKET_BYTES", 4000)
    mine, theirs = parameters(torch.float32), parameters(torch.float32)
    written = ",".join(f"{key}={value}".lower() for key, value in config.items())
    optimizer = optimizer_of("prodigy", mine, written)
    with contextlib.redirect_stdout(io.StringIO()):
        library = prodigyopt.Prodigy(theirs, weight_decay=0.01, **config)
    train(optimizer, mine, 1.0, steps=12)
    train(library, theirs, 1.0, steps=12)
    for ours, reference in zip(mine, theirs):
        assert torch.allclose(ours, reference, rtol=1e-4, atol=1e-7)
    ours, reference = (one.state_dict() for one in (optimizer, library))
    assert ours["param_groups"][0]["d"] == pytest.approx(reference["param_groups"][0]["d"], 1e-4)
    assert ours["param_groups"][0].keys() == reference["param_groups"][0].keys()
    for index, state in reference["state"].items():
        assert state.keys() == ours["state"][index].keys()
    # The library's state continues here, as that of an earlier checkpoint does.
    optimizer.load_state_dict(reference)
    train(optimizer, mine, 1.0, steps=1)


def test_groups_with_rates_of_their_own_keep_their_layouts() -> None:
    params = parameters(torch.float32)
    optimizer = optimizer_of("adamw_8bit", params)
    optimizer.param_groups[0]["params"] = params[::2]
    optimizer.add_param_group({**optimizer.param_groups[0], "params": params[1::2]})
    layouts = []
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        layouts.append(dict(optimizer._layouts))
    assert len(layouts[0]) == 2
    assert all(layouts[0][key] is layout for key, layout in layouts[1].items())
