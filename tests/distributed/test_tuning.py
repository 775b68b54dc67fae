"""Held-out images, early stopping and what was learnt on two processes equal those on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.events.event_types import (
    Event,
    SampleLossesMeasured,
    VerdictReached,
    WeightChangeMeasured,
)
from tests.distributed.test_replicated import Trainings
from tests.e2e.training_project import make_images, read_events, read_losses

LORA = "pytorch_lora_weights.safetensors"
# A rate that is far too high: the held-out loss rises from some measurement on, and the run ends.
STOPPING = {
    "validation_split": 0.34, "num_train_loss_images": 7, "early_stopping": True,
    "early_stopping_patience": 2, "eval_steps_interval": 1, "checkpoint_step_interval": 50,
    "max_train_steps": 12, "learning_rate": 0.15, "lr_warmup_steps": 0, "lora_format": "auto",
    "eval_sigma_count": 1, "use_ema": False, "train_batch_size": 1, "checkpoints_total_limit": 2,
}  # fmt: skip
COMPARED = ("evaluated", "verdict", "sample_losses", "weight_change")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """Ten images without an eval dataset, so that the losses of the trained ones take two batches."""
    made = Trainings(tmp_path_factory.mktemp("tuning"))
    make_images(made.root / "pictures" / "more", count=4, first=20)
    path = made.root / "multidatabackend.json"
    sets = [one for one in json.loads(path.read_text()) if one["dataset_type"] != "eval"]
    path.write_text(json.dumps(sets))
    return made


@pytest.fixture(scope="module")
def one(split: Trainings) -> Path:
    return split.train("one", 1, **STOPPING, gradient_accumulation_steps=2)


def findings(run_dir: Path) -> list[Event]:
    """Every measurement, verdict and table, and the notices about the split and the end."""
    return [
        event
        for event in read_events(run_dir)
        if event.kind in COMPARED
        or (event.kind == "noted" and ("held out" in str(event) or "early_stopping" in str(event)))
    ]


def held_out(run_dir: Path) -> list[str]:
    checkpoint = max(run_dir.glob("checkpoint-*"))
    return list(json.loads((checkpoint / "state.json").read_text())["held_out"])


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"fsdp_enable": True}, marks=pytest.mark.slow)]
)
def test_a_run_that_stops_early_equals_that_of_one_process(
    options: dict[str, Any], split: Trainings, one: Path
) -> None:
    name = f"two-{'-'.join(options)}"
    two = split.train(
        name, 2, **STOPPING, **options, gradient_accumulation_steps=1,
        cache_dir=str(split.root / f"cache-{name}"),
    )  # fmt: skip
    last = max(read_losses(one))
    assert last < STOPPING["max_train_steps"], "the run did not end early"
    assert read_losses(two) == read_losses(one)
    assert held_out(two) == held_out(one)
    assert len(held_out(one)) == 3
    expected, found = findings(one), findings(two)
    for mine, other in zip(found, expected, strict=True):
        assert mine == other
    assert {event.kind for event in expected} == {*COMPARED, "noted"}
    tables = [event for event in expected if isinstance(event, SampleLossesMeasured)]
    assert [len(event.losses) for event in tables] == [3, 7]
    best = [event for event in expected if isinstance(event, VerdictReached)][-1].best_step
    assert 0 < best < last
    weights = [load_file(folder / LORA) for folder in (one, two, two / f"checkpoint-{best}")]
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[key], tensor) for key, tensor in weights[0].items())


def weight_changes(run_dir: Path) -> dict[int, WeightChangeMeasured]:
    events = read_events(run_dir)
    return {event.step: event for event in events if isinstance(event, WeightChangeMeasured)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"base_model_precision": "int8"},
        {"use_dora": True},
        {"model_type": "full", "learning_rate": 1e-3, "lora_rank": None, "lora_dropout": None},
    ],
    ids=["int8", "dora", "full"],
)
def test_the_change_of_a_sharded_network_equals_that_of_one_process(
    options: dict[str, Any], split: Trainings
) -> None:
    """Three processes, whose rows are not equally many. Their sums round differently."""
    common = {
        **options, "use_ema": False, "max_train_steps": 2, "checkpoint_step_interval": 1,
        "train_batch_size": 1, "fsdp_enable": True, "validation_split": 0.34,
    }  # fmt: skip
    name = "-".join(options)
    alone, three = (
        weight_changes(
            split.train(f"{name}-{count}", count, **common, gradient_accumulation_steps=3 // count)
        )
        for count in (1, 3)
    )
    assert sorted(alone) == sorted(three) == [1, 2]
    for step, change in alone.items():
        assert change.total > 0
        assert three[step].total == pytest.approx(change.total, rel=1e-5)
        assert three[step].blocks == pytest.approx(change.blocks, rel=1e-5)
