"""dynamo_backend "auto": what is compiled, by the length of the training and what is there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.events.event_types import Event, NoticeIssued
from simpletuner.training.memory_plan import compile_choice, preflight
from simpletuner.training.memory_plan.compile_choice import choose_compilation, try_inductor
from simpletuner.training.memory_plan.machine_resources import MachineResources
from simpletuner.training.memory_plan.prediction import MemoryPrediction, predict_memory
from simpletuner.training.memory_plan.world_layout import WorldLayout
from tests.training.memory_plan.tiny_family import TinyChroma, make_run_config

SIZE = (ResizeCropConfig(resolution=256),)
STEP_S = 2.0


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> MemoryPrediction:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return predict_memory(make_run_config(), TinyChroma(), SIZE)


def card(plan: MemoryPrediction, room: float = 2.0) -> MachineResources:
    """A GPU on which a step of the plan takes STEP_S seconds."""
    peak = plan.flops / (STEP_S * 0.5)
    return MachineResources("a card", "cuda", peak, int(plan.training * room))


def works() -> None:
    return None


@pytest.mark.parametrize(
    ("options", "room", "value"),
    [
        ({"max_train_steps": 600}, 2.0, "inductor"),
        ({"max_train_steps": 590}, 2.0, "no"),
        ({"max_train_steps": 600}, 1.05, "no"),
        ({"max_train_steps": 600, "base_model_precision": "int8"}, 1.05, "dequantize"),
        ({"max_train_steps": 150, "base_model_precision": "int8"}, 2.0, "dequantize"),
        ({"max_train_steps": 149, "base_model_precision": "int8"}, 2.0, "no"),
        ({"max_train_steps": None, "num_train_epochs": 100}, 2.0, "no"),
    ],
)
def test_what_is_compiled(
    plan: MemoryPrediction, options: dict[str, Any], room: float, value: str
) -> None:
    run = make_run_config(**options)
    assert choose_compilation(run, plan, card(plan, room), None, works).value == value


def test_an_obstacle_is_asked_for_only_where_it_matters(plan: MemoryPrediction) -> None:
    def missing() -> str:
        asked.append(1)
        return "Triton is not installed"

    asked: list[int] = []
    long, short = make_run_config(max_train_steps=600), make_run_config(max_train_steps=10)
    assert choose_compilation(short, plan, card(plan), None, missing).value == "no"
    assert not asked
    choice = choose_compilation(long, plan, card(plan), None, missing)
    assert str(choice) == "dynamo_backend auto: no (Triton is not installed)"


def test_other_devices_small_bases_and_engines_run_eagerly(plan: MemoryPrediction) -> None:
    run = make_run_config(max_train_steps=10_000, base_model_precision="int8")
    cpu = MachineResources("a CPU", "cpu", 1e9, 10**12)
    engine = dataclasses.replace(plan, world=WorldLayout(2, 2, "zero2", ("optimizer",)))
    for given, budget in ((plan, cpu), (None, card(plan)), (engine, card(plan))):
        assert choose_compilation(run, given, budget, None, works).value == "no"


def test_blocks_whose_weights_move_are_not_compiled(plan: MemoryPrediction) -> None:
    run = make_run_config(max_train_steps=10_000, base_model_precision="int8")
    sharded = dataclasses.replace(plan, world=WorldLayout(2, 2, "sharded", ("weights",)))
    swapped = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, swapped=1))
    for given in (sharded, swapped):
        assert choose_compilation(run, given, card(plan), None, works).value == "dequantize"


def test_a_resumed_run_keeps_the_choice(plan: MemoryPrediction, tmp_path: Path) -> None:
    run = make_run_config(max_train_steps=600)
    for stored, value in (("no", "no"), ("inductor", "inductor"), ("auto", "inductor"),
                          ("warp", "inductor")):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({"dynamo_backend": stored}))
        assert choose_compilation(run, plan, card(plan), tmp_path, works).value == value


def test_the_run_holds_the_resolved_value(
    plan: MemoryPrediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told on a GPU; an option that was set is left alone."""
    events: list[Event] = []
    monkeypatch.setattr(compile_choice, "find_inductor_obstacle", works)
    run = make_run_config(max_train_steps=600)
    assert run.model.dynamo_backend == "auto"
    assert not run.model.compiles_blocks
    resolved = preflight.resolve_compilation(run, plan, card(plan), None, events.append)
    assert resolved.model.dynamo_backend == "inductor"
    assert resolved.model.compiles_blocks
    assert [event.message for event in events if isinstance(event, NoticeIssued)] == [
        "dynamo_backend auto: inductor (the training is long enough to gain from it)"
    ]
    cpu = MachineResources("a CPU", "cpu", 1e9, 10**12)
    resolved = preflight.resolve_compilation(run, plan, cpu, None, events.append)
    assert resolved.model.dynamo_backend == "no"
    assert len(events) == 1
    eager = make_run_config(max_train_steps=600, dynamo_backend="no")
    assert preflight.resolve_compilation(eager, plan, card(plan), None, events.append) is eager


def test_a_compiler_that_fails_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, backend: str) -> Any:
        raise RuntimeError(f"{backend} is broken\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    assert try_inductor(torch.device("cpu")) == (
        "torch.compile does not work here: inductor is broken"
    )


@pytest.mark.slow
def test_a_compiler_that_works_is_none() -> None:
    assert try_inductor(torch.device("cpu")) is None
