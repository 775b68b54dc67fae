"""Steps inside the backward pass and states on the host: the ordinary loop's numbers, with less at
a time.
"""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.config.constraints import find_errors
from simpletuner.config.schema import OptimizerOptions, RunConfig, TrainingOptions
from simpletuner.errors import TrainingDiverged
from simpletuner.training import loop
from simpletuner.training.gradient_sum import GradientSum
from simpletuner.training.optimizer_offload import OffloadedOptimizerState
from simpletuner.training.optimizer_step import (
    OPTIMIZER_STEPS,
    OptimizerStep,
    OptimizerStepInBackward,
    PerParameterOptimizerStep,
    StandardOptimizerStep,
    make_optimizer_step,
    optimizer_step_name,
)
from simpletuner.training.optimizers import OPTIMIZERS, build_optimizer
from simpletuner.training.world import World
from tests.training.test_loop import TrainSchedule, parts
from tests.training.test_optimizers import same

ALONE = [name for name in OPTIMIZERS if name != "prodigy"]
HOSTED = [name for name in ALONE if name != "adamw_schedulefree"]


class Net(nn.Module):
    """Matrices and vectors, one of them used twice, half of it recomputed in the backward pass."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up, self.norm = nn.Linear(24, 12), nn.Linear(12, 24), nn.LayerNorm(24)
        self.unused = nn.Linear(2, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.up(torch.tanh(self.down(self.norm(x))))
        return x + checkpoint(lambda x: self.up(torch.tanh(self.down(x))), x, use_reentrant=False)


def train(
    net: Net, update: OptimizerStep, optimizer: torch.optim.Optimizer, steps: int, first: int = 0
) -> list[float]:
    """As the loop does; returns the norms."""
    norms = []
    for number in range(first, first + steps):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(number)).to(
            net.up.weight.dtype
        )
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + number % 3)
        update.backward((net(x).float() - 1).square().mean() * 10, 0)
        norms.append(update.clip_gradients())
        update.apply()
        update.zero_grad()
    return norms


def options(name: str, limit: float = 0.0, **more: object) -> OptimizerOptions:
    return OptimizerOptions(optimizer=name, max_grad_norm=limit, grad_clip_method="value", **more)


def ready(
    options: OptimizerOptions, dtype: torch.dtype
) -> tuple[Net, OptimizerStep, torch.optim.Optimizer]:
    net = Net(dtype)
    optimizer = build_optimizer(options, list(net.named_parameters()), seed=3)
    name = optimizer_step_name(options, torch.device("cpu"))
    return net, make_step(name, list(net.parameters()), optimizer, options), optimizer


def make_step(
    name: str,
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    options: OptimizerOptions,
) -> OptimizerStep:
    return make_optimizer_step(name, params, optimizer, options, GradientSum(params, World()))


def equal(net: Net, other: Net) -> bool:
    return all(map(torch.equal, net.parameters(), other.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [0.0, 0.02])
@pytest.mark.parametrize("name", ALONE)
def test_released_gradients_are_the_same_training(
    name: str, limit: float, dtype: torch.dtype
) -> None:
    net, update, optimizer = ready(options(name, limit), dtype)
    other, released, its = ready(options(name, limit, optimizer_release_gradients=True), dtype)
    if name in ("lion", "adamw_schedulefree"):  # torch wraps the step of a class that is in use
        type(optimizer).__bases__[0]([nn.Parameter(torch.zeros(1))], lr=1.0)
    assert isinstance(update, StandardOptimizerStep)
    assert isinstance(released, OptimizerStepInBackward)
    alive: list[int] = []
    its.register_step_pre_hook(
        lambda *_: alive.append(sum(each.grad is not None for each in other.parameters()))
    )
    assert train(net, update, optimizer, 5) == train(other, released, its, 5)
    assert equal(net, other)
    assert same(optimizer.state_dict(), its.state_dict())
    assert alive == [1] * 5 * 6, "one gradient at a time, each parameter once a step"
    # and either goes on from the other's checkpoint
    resumed, ordinary, third = ready(options(name, limit), dtype)
    resumed.load_state_dict(other.state_dict())
    third.load_state_dict(copy.deepcopy(its.state_dict()))
    train(net, update, optimizer, 2, first=5)
    train(resumed, ordinary, third, 2, first=5)
    assert equal(net, resumed)


def test_a_bad_loss_changes_nothing_and_a_bad_gradient_stops_the_run() -> None:
    net, update, _ = ready(options("adamw", optimizer_release_gradients=True), torch.float32)
    before = copy.deepcopy(net.state_dict())
    total = net(torch.randn(8, 24)).mean()
    update.backward(total * math.nan, 0)
    assert math.isnan(update.clip_gradients())
    run = parts(TrainSchedule(100, 1, 10, 5), told=[])
    run.optimizer_step = update
    loop.handle_nonfinite_step(run, 0, math.nan, math.nan, [("a", 0.5)])
    update.zero_grad()
    assert same(dict(net.state_dict()), dict(before))

    update.backward((net.down.weight.sum() * 0).sqrt(), 0)  # 0, and its slope is 0 times infinity
    assert update.weights_modified
    assert not math.isfinite(update.clip_gradients())
    with pytest.raises(TrainingDiverged, match="last checkpoint is not affected"):
        loop.handle_nonfinite_step(run, 1, 1.0, math.inf, [("a", 0.5)])


class Bus:
    """A device that is not there: what has been fetched and is still alive, and what lies on the
    host.
    """

    def __init__(self) -> None:
        self.visiting = self.highest = self.kept = 0

    def fetch(self, tensor: Tensor, device: torch.device) -> Tensor:
        visitor = tensor.clone()
        self.visiting += visitor.nbytes
        self.highest = max(self.highest, self.visiting)
        weakref.finalize(visitor, self._left, visitor.nbytes)
        return visitor

    def _left(self, size: int) -> None:
        self.visiting -= size

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept += tensor.nbytes
        return tensor.clone()


@pytest.mark.parametrize("releases", [False, True])
@pytest.mark.parametrize("name", HOSTED)
def test_states_on_the_host_are_the_same_training(name: str, releases: bool) -> None:
    net, update, optimizer = ready(options(name), torch.bfloat16)
    other = Net(torch.bfloat16)
    params = list(other.parameters())
    its = build_optimizer(options(name), list(other.named_parameters()), seed=3)
    bus = Bus()
    states = OffloadedOptimizerState(its, bus.fetch, bus.keep)
    strategy = OptimizerStepInBackward if releases else PerParameterOptimizerStep
    hosted = strategy(params, its, options(name), GradientSum(params, World()), states)
    assert train(net, update, optimizer, 1) == train(other, hosted, its, 1)
    homes = {
        id(tensor): tensor.data_ptr() for state in its.state.values() for tensor in tensors(state)
    }
    assert train(net, update, optimizer, 4, first=1) == train(other, hosted, its, 4, first=1)
    assert equal(net, other)
    assert same(optimizer.state_dict(), its.state_dict())
    sizes = [sum(tensor.nbytes for tensor in tensors(state)) for state in its.state.values()]
    assert bus.visiting == 0, "between steps nothing is on the device"
    assert 0 < bus.highest <= max(sizes)
    assert bus.kept == sum(sizes), "each came to the host once; then its place is written again"
    assert homes == {
        id(tensor): tensor.data_ptr() for state in its.state.values() for tensor in tensors(state)
    }


def tensors(state: dict[str, object]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor) and value.ndim]


def test_states_stay_where_the_device_has_the_hosts_memory() -> None:
    _, update, _ = ready(options("adamw", optimizer_cpu_offload_method="states"), torch.float32)
    assert type(update) is StandardOptimizerStep
    assert update.offloaded_state is None


def test_the_strategy_is_chosen_by_name() -> None:
    chosen = {
        optimizer_step_name(options("adamw", **more), torch.device(device))
        for device in ("cpu", "cuda")
        for more in (
            {},
            {"optimizer_cpu_offload_method": "states"},
            {"optimizer_release_gradients": True},
            {"optimizer_release_gradients": True, "optimizer_cpu_offload_method": "states"},
        )
    }
    assert chosen == set(OPTIMIZER_STEPS)
    on_gpu = optimizer_step_name(
        options("adamw", optimizer_cpu_offload_method="states"), torch.device("cuda")
    )
    assert OPTIMIZER_STEPS[on_gpu] is PerParameterOptimizerStep


def test_a_new_strategy_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(StandardOptimizerStep):
        """Halves every loss."""

        def backward(self, loss: Tensor, place: int) -> None:
            super().backward(loss / 2, place)

    monkeypatch.setitem(OPTIMIZER_STEPS, "half", Half)
    net, ordinary, _ = ready(options("adamw"), torch.float32)
    params = list(net.parameters())
    half = make_step("half", params, ordinary.optimizer, options("adamw"))
    loss = net(torch.ones(2, 24)).mean()
    ordinary.backward(loss, 0)
    whole_norm = ordinary.clip_gradients()
    ordinary.zero_grad()
    half.backward(net(torch.ones(2, 24)).mean(), 0)
    assert half.clip_gradients() == pytest.approx(whole_norm / 2)


@pytest.mark.parametrize(
    ("given", "accumulation", "option", "word"),
    [
        ({"optimizer_release_gradients": True}, 1, "optimizer_release_gradients", 'grad_clip_method "value"'),
        (
            {"optimizer_release_gradients": True, "max_grad_norm": 0}, 2,
            "optimizer_release_gradients", "use 1",
        ),
        (
            {"optimizer_release_gradients": True, "max_grad_norm": 0, "optimizer": "prodigy"}, 1,
            "optimizer_release_gradients", "another optimizer",
        ),
        (
            {"optimizer_cpu_offload_method": "states", "optimizer": "prodigy"}, 1,
            "optimizer_cpu_offload_method", "another optimizer",
        ),
        (
            {"optimizer_cpu_offload_method": "states", "optimizer": "adamw_schedulefree"}, 1,
            "optimizer_cpu_offload_method", "adamw_8bit",
        ),
        ({"optimizer_cpu_offload_method": "states"}, 4, None, ""),
        ({"optimizer_release_gradients": True, "grad_clip_method": "value"}, 1, None, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    given: dict[str, object], accumulation: int, option: str | None, word: str
) -> None:
    training = TrainingOptions(gradient_accumulation_steps=accumulation)
    run = RunConfig(optimizer=OptimizerOptions(**given), training=training)
    found = [(name, what) for name, what in find_errors(run, {}) if name.startswith("optimizer")]
    assert [name for name, _ in found] == ([option] if option else [])
    assert all(word in what for _, what in found)
