"""When things are due, which weights they see, and how many bad steps are borne."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch

from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import TrainingDiverged
from simpletuner.events.types import Event
from simpletuner.training import loop, optimizers
from simpletuner.training.loop import Every, Parts, Plan
from simpletuner.training.update import Whole


def parts(plan: Plan, *, optimizer: object = None, told: list[Event] | None = None) -> Parts:
    """Only what these tests look at; the rest of the fields is never asked."""
    fields = dict.fromkeys(Parts.__dataclass_fields__, None)
    emit = (told if told is not None else []).append
    update = Whole((), optimizer, OptimizerOptions())  # type: ignore[arg-type]
    given = {"plan": plan, "optimizer": optimizer, "update": update, "emit": emit, "every": (), "skipped": 0}
    return Parts(**{**fields, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(("batches", "accumulation"), [(5, 2), (2, 4), (6, 3), (7, 1)])
def test_epochs_end_where_their_last_batch_is_behind(batches: int, accumulation: int) -> None:
    plan = Plan(40, accumulation, batches, 0)
    every = Every(plan.epoch, lambda step: None)
    due = [step for step in range(1, 40) if every.due(step, 40)]
    ends = {math.ceil(epoch * batches / accumulation) for epoch in range(1, 200)}
    assert due == sorted(step for step in ends if step < 40)


def test_steps_at_the_start_and_at_the_end() -> None:
    every = Every(lambda step: step // 3, lambda step: None, at_start=True)
    assert [step for step in range(9) if every.due(step, 8)] == [0, 3, 6, 8]
    assert every.due(9, 8), "a run resumed beyond its end"
    assert not Every(lambda step: step // 3, lambda step: None).due(0, 8)


@pytest.mark.parametrize("patience", [0, 1, 2, 5])
def test_patience_counts_bad_steps_in_a_row(patience: int) -> None:
    run = parts(Plan(100, 1, 10, patience))
    for step in range(patience):
        loop.refuse(run, step, math.nan, 1.0, [("a", 0.5)])
    with pytest.raises(TrainingDiverged, match=r"a \(sigma 0.5000\)"):
        loop.refuse(run, patience, math.nan, 1.0, [("a", 0.5)])


def test_what_is_asked_for_sees_the_weights_that_are_kept() -> None:
    """Schedule-free: the average while something looks, the training point afterwards, also after a stop."""
    named = [("a", torch.nn.Parameter(torch.ones(2)))]
    optimizer = optimizers.build(OptimizerOptions(optimizer="adamw_schedulefree"), named, seed=1)
    named[0][1].grad = torch.ones(2)
    optimizer.step()
    run = parts(Plan(10, 1, 10, 0), optimizer=optimizer)
    modes: list[bool] = []

    def look(step: int) -> None:
        modes.append(cast(bool, optimizer.param_groups[0]["train_mode"]))
        raise InterruptedError

    run.asked = lambda: [look]
    with pytest.raises(InterruptedError):
        loop.tell(run, 3)
    assert modes == [False]
    assert optimizer.param_groups[0]["train_mode"]
