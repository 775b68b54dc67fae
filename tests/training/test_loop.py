"""When things are due, which weights they see, and how many bad steps are borne."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from simpletuner.config.schema import OptimizerOptions
from simpletuner.errors import TrainingDiverged
from simpletuner.events.event_types import Event
from simpletuner.training import loop, optimizers
from simpletuner.training.callbacks import every as every_steps
from simpletuner.training.device import HARDWARE_BY_TYPE, ComputeDevice, Hardware
from simpletuner.training.gradient_sum import GradientSum
from simpletuner.training.loop import ScheduledCallback, TrainerContext, TrainSchedule
from simpletuner.training.optimizer_step import StandardOptimizerStep
from simpletuner.training.run_start import emit_run_start
from simpletuner.training.world import World


def parts(
    plan: TrainSchedule, *, optimizer: object = None, told: list[Event] | None = None
) -> TrainerContext:
    """Only what these tests look at; the rest of the fields is never asked."""
    fields = dict.fromkeys(TrainerContext.__dataclass_fields__, None)
    emit = (told if told is not None else []).append
    update = StandardOptimizerStep((), optimizer, OptimizerOptions(), GradientSum((), World()))  # type: ignore[arg-type]
    given = {"schedule": plan, "optimizer": optimizer, "optimizer_step": update, "emit": emit}
    given |= {"world": World(), "callbacks": (), "consecutive_skipped_steps": 0}
    given["ends_after"] = lambda step: False
    return TrainerContext(**{**fields, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(("batches", "accumulation"), [(5, 2), (2, 4), (6, 3), (7, 1)])
def test_epochs_end_where_their_last_batch_is_behind(batches: int, accumulation: int) -> None:
    plan = TrainSchedule(40, accumulation, batches, 0)
    every = ScheduledCallback(plan.epoch_at, lambda step: None)
    due = [step for step in range(1, 40) if every.is_due(step, 40)]
    ends = {math.ceil(epoch * batches / accumulation) for epoch in range(1, 200)}
    assert due == sorted(step for step in ends if step < 40)


def test_steps_at_the_start_and_at_the_end() -> None:
    every = ScheduledCallback(lambda step: step // 3, lambda step: None, at_start=True)
    assert [step for step in range(9) if every.is_due(step, 8)] == [0, 3, 6, 8]
    assert every.is_due(9, 8), "a run resumed beyond its end"
    assert not ScheduledCallback(lambda step: step // 3, lambda step: None).is_due(0, 8)
    only_last = ScheduledCallback(every_steps(0), lambda step: None)
    assert [step for step in range(9) if only_last.is_due(step, 8)] == [8]


@pytest.mark.parametrize("patience", [0, 1, 2, 5])
def test_patience_counts_bad_steps_in_a_row(patience: int) -> None:
    run = parts(TrainSchedule(100, 1, 10, patience))
    for step in range(patience):
        loop.handle_nonfinite_step(run, step, math.nan, 1.0, [("a", 0.5)])
    with pytest.raises(TrainingDiverged, match=r"a \(sigma 0.5000\)"):
        loop.handle_nonfinite_step(run, patience, math.nan, 1.0, [("a", 0.5)])


def test_what_is_asked_for_sees_the_weights_that_are_kept() -> None:
    """Schedule-free: the average while something looks, the training point afterwards, also after a
    stop.
    """
    named = [("a", torch.nn.Parameter(torch.ones(2)))]
    optimizer = optimizers.build_optimizer(
        OptimizerOptions(optimizer="adamw_schedulefree"), named, seed=1
    )
    named[0][1].grad = torch.ones(2)
    optimizer.step()
    run = parts(TrainSchedule(10, 1, 10, 0), optimizer=optimizer)
    modes: list[bool] = []

    def look(step: int) -> None:
        modes.append(cast(bool, optimizer.param_groups[0]["train_mode"]))
        raise InterruptedError

    run.requested_callbacks = lambda: [look]
    with pytest.raises(InterruptedError):
        loop.run_due_callbacks(run, 3)
    assert modes == [False]
    assert optimizer.param_groups[0]["train_mode"]


class CountedHardware(Hardware):
    """A device whose peak starts again at each reset, which is counted."""

    resets = 0

    def __init__(self, device: torch.device) -> None:
        del device

    def reset_peak(self) -> None:
        CountedHardware.resets += 1


def test_a_steps_peak_is_not_that_of_another_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of what came before the training, nor of the images between two steps."""
    monkeypatch.setitem(HARDWARE_BY_TYPE, "cpu", CountedHardware)
    monkeypatch.setattr(CountedHardware, "resets", 0)
    device = ComputeDevice(torch.device("cpu"), torch.float32, None)
    plan = TrainSchedule(10, 1, 10, 0)
    folder: Any = SimpleNamespace(path="run")
    emit_run_start(None, folder, "model", device, plan, None, (), lambda event: None)
    assert CountedHardware.resets == 1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    context = dataclasses.replace(parts(plan, optimizer=optimizer), device=device)
    context.requested_callbacks = lambda: [lambda step: None, lambda step: None]
    loop.run_due_callbacks(context, 3)
    assert CountedHardware.resets == 3
    context.requested_callbacks = list
    loop.run_due_callbacks(context, 4)
    assert CountedHardware.resets == 3


@pytest.mark.parametrize("resumed", [0, 3, 4, 6])
def test_sigmas_are_prepared_before_the_steps_that_need_them(
    resumed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's own sigmas, once, in chunks that begin at multiples of 4 or where it resumes."""
    context = parts(TrainSchedule(10, 1, 5, 0, sigma_chunk_steps=4))
    context.resumed_step = resumed
    prepared: list[float] = []
    chunks: list[int] = []

    def prepare(sigma: torch.Tensor) -> None:
        prepared.extend(sigma.tolist())
        chunks.append(len(sigma))

    context.prepare_sigmas = prepare
    monkeypatch.setattr(
        loop, "split_into_micro_batches", lambda context, step: [(step, torch.tensor([step + 0.5]))]
    )
    for step in range(resumed, 10):
        loop.prepare_next_sigmas(context, step)
        assert step + 0.5 in prepared
    assert prepared == [step + 0.5 for step in range(resumed, 10)]
    assert chunks == {0: [4, 4, 2], 3: [1, 4, 2], 4: [4, 2], 6: [2, 2]}[resumed]
