"""Masks, regularisation, second captions and the penalty on two processes equal those of one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_replicated import Trainings
from tests.e2e.test_preservation import (
    EVERYTHING,
    MASKS,
    REGULARISATION,
    write_datasets,
    write_mask,
)
from tests.e2e.training_project import (
    TrainingProject,
    make_images,
    read_checkpoint_files,
    read_losses,
)

STEPS = 3
OPTIONS = {**EVERYTHING, "max_train_steps": STEPS, "train_batch_size": 1}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """One image to a batch, so that one process may need the base while the other does not."""
    trainings = Trainings(tmp_path_factory.mktemp("preserved"))
    project = TrainingProject.__new__(TrainingProject)
    project.root = trainings.root
    make_images(project.root / "reg", count=3, first=20)
    for number in range(6):
        write_mask(project.root, number, None)
    write_datasets(project, MASKS, REGULARISATION, conditioning_data="masks")
    return trainings


@pytest.fixture(scope="module")
def one(prepared: Trainings) -> Path:
    return prepared.train("one", 1, **OPTIONS, gradient_accumulation_steps=2)


def outcome(run_dir: Path) -> tuple[Any, ...]:
    return read_losses(run_dir), read_checkpoint_files(run_dir / f"checkpoint-{STEPS}")


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_equal_one(sharded: bool, prepared: Trainings, one: Path) -> None:
    two = prepared.train(
        f"two-{sharded}", 2, **OPTIONS, gradient_accumulation_steps=1, fsdp_enable=sharded,
        cache_dir=str(prepared.root / f"cache-{sharded}"),
    )  # fmt: skip
    assert outcome(two) == outcome(one)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_one_process(stage: int, prepared: Trainings) -> None:
    options = {**OPTIONS, "lora_dropout": 0.0, "use_ema": False, "max_grad_norm": 0.5}
    options["delta_weight_penalty"] = 0.01 if stage < 3 else 0.0
    alone = prepared.train(f"alone-{stage}", 1, **options, gradient_accumulation_steps=2)
    section = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    zero = prepared.train(
        f"zero-{stage}", 2, **options, gradient_accumulation_steps=1,
        deepspeed_config={"zero_optimization": section},
    )  # fmt: skip
    found, expected = read_losses(zero), read_losses(alone)
    for step in range(1, STEPS + 1):
        assert found[step] == pytest.approx(expected[step], rel=2e-5), step
