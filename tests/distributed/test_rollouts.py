"""Rollouts and images from images on two processes equal those of one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_replicated import Trainings
from tests.e2e.training_project import read_checkpoint_files, read_losses

STEPS = 3
# One sample to a batch: in some steps one process has a rollout and the other has none.
ROLLOUTS = {
    "scheduled_sampling_probability": 0.5,
    "train_batch_size": 1,
    "max_train_steps": STEPS,
    "eval_loss_disable": True,
    "eval_steps_interval": None,
}
IMAGES = {
    "validation_disable": False,
    "validation_prompt": "a red square",
    "validation_num_inference_steps": 4,
    "validation_resolution": "64",
    "validation_step_interval": STEPS,
    "validation_using_datasets": True,
    "validation_denoise": 0.5,
}


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_roll_out_like_one(sharded: bool, tmp_path: Path) -> None:
    trainings = Trainings(tmp_path)
    options = {**ROLLOUTS, **IMAGES}
    if sharded:
        options |= {"fsdp_enable": True, "mixed_precision": "bf16"}
    one, two = (
        trainings.train(f"rolled-{count}", count, **options, gradient_accumulation_steps=2 // count)
        for count in (1, 2)
    )
    assert read_losses(two) == read_losses(one)
    checkpoints = [read_checkpoint_files(run_dir / f"checkpoint-{STEPS}") for run_dir in (one, two)]
    assert checkpoints[0] == checkpoints[1]
    images = sorted(path.relative_to(one) for path in one.glob("images/step-*/*.png"))
    assert {path.name.split("-")[0] for path in images} == {"validation", "from"}
    for image in images:
        assert (one / image).read_bytes() == (two / image).read_bytes(), image
    plain = trainings.train(
        "plain", 1, **{**options, "scheduled_sampling_probability": 0.0, "validation_disable": True},
        gradient_accumulation_steps=2,
    )  # fmt: skip
    assert read_losses(plain) != read_losses(one)
