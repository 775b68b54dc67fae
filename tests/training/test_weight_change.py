"""The sample of a sharded network, and the notice where nothing is measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner.config.schema import OptimizerOptions
from simpletuner.events.event_types import Event, NoticeIssued
from simpletuner.training import weight_change
from simpletuner.training.sharding import Sharding
from simpletuner.training.weight_change import WeightChange, sample_weights
from simpletuner.training.world import World

ROWS, COLUMNS = 7, 5


class Rows(Sharding):
    """A process that holds rows from `start` on of every matrix of seven rows."""

    is_sharded = True

    def __init__(self, start: int) -> None:
        super().__init__(World(), False, OptimizerOptions())
        self.start = start

    def flat_range(self, name: str, param: nn.Parameter) -> tuple[int, int]:
        return self.start * COLUMNS, ROWS * COLUMNS


def test_the_parts_of_a_sharded_matrix_have_the_sample_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The numbers of the matrix are their places, and a process may hold no rows at all."""
    monkeypatch.setattr(weight_change, "SAMPLED_WEIGHTS", 20)
    matrix = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    whole = sample_weights(
        {"w": nn.Parameter(matrix)}, Sharding(World(), False, OptimizerOptions())
    )
    found: list[float] = []
    for start, end in ((0, 3), (3, 6), (6, 7), (7, 7)):
        part = nn.Parameter(matrix[start:end].clone())
        places, values = sample_weights({"w": part}, Rows(start))["w"]
        assert values.tolist() == part.detach().flatten()[places].tolist()
        found += values.tolist()
    assert sorted(found) == sorted(whole["w"][1].tolist())
    assert len(found) == 20


def test_the_sums_of_all_processes_are_added() -> None:
    """The other process has no change, and 3 more in the squares of its weights."""
    added: list[torch.Tensor] = []

    class WithAnother(World):
        def all_reduce(self, tensor: torch.Tensor) -> None:
            added.append(tensor.clone())
            tensor += torch.tensor([[0.0, 3.0]])

    parameter = nn.Parameter(torch.ones(1, COLUMNS))
    state: Any = SimpleNamespace(
        sharding=Rows(0), uses_lora=False, trainable_parameters={"w": parameter}
    )
    events: list[Event] = []
    measured = WeightChange(state, WithAnother(1, 2), events.append)
    with torch.no_grad():
        parameter += 2
    measured.measure(4)
    (sums,) = added
    change, weight = sums[0].tolist()
    assert change == 4 * weight > 0
    assert vars(events[0])["total"] == pytest.approx((change / (weight + 3)) ** 0.5)


def test_a_network_that_is_not_measured_is_named_once() -> None:
    class Engine(Sharding):
        option = "deepspeed_config"
        is_sharded = True
        measures_change = False

    events: list[Event] = []
    sharding = Engine(World(), False, OptimizerOptions())
    state: Any = SimpleNamespace(sharding=sharding, uses_lora=False)
    measured = WeightChange(state, World(), events.append)
    measured.measure(1)
    measured.measure(2)
    assert events == [
        NoticeIssued("the change of the weights is not measured with deepspeed_config")
    ]
