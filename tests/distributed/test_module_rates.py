"""Rates and ranks by module and weights by noise level on several processes: the bits of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_replicated import Trainings
from tests.distributed.test_sharded import FULL, STEPS, outcome, train
from tests.e2e.test_resume import FINER_CONTROL
from tests.e2e.training_project import read_losses

pytestmark = pytest.mark.slow
RATES = {
    "lr_by_module": FINER_CONTROL["lr_by_module"],
    "loss_weight_by_sigma": FINER_CONTROL["loss_weight_by_sigma"],
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    made = Trainings(tmp_path_factory.mktemp("rates"))
    made.options |= {"max_train_steps": STEPS, "caption_dropout_probability": 0.0}
    return made


@pytest.mark.parametrize("sharded", [False, True])
def test_a_lora_has_the_bits_of_one_process(sharded: bool, trainings: Trainings) -> None:
    one = trainings.train(f"one-{sharded}", 1, gradient_accumulation_steps=2, **FINER_CONTROL)
    options = {**FINER_CONTROL, "fsdp_enable": sharded}
    two = trainings.train(f"two-{sharded}", 2, gradient_accumulation_steps=1, **options)
    assert read_losses(two) == read_losses(one)
    assert outcome(two) == outcome(one)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "adamw_8bit", "adafactor", "muon"])
def test_full_fine_tuning_has_the_bits_of_one_process_and_resumes(
    optimizer: str, trainings: Trainings
) -> None:
    """The states of the parameters are saved by group, and each rank holds its rows of them."""
    options = {**FULL, **RATES, "optimizer": optimizer}
    one, two = (train(trainings, f"{optimizer}-{count}", count, 2, **options) for count in (1, 2))
    assert read_losses(two) == read_losses(one)
    assert outcome(two) == outcome(one)
    trainings.copy_checkpoint(one, 1, f"{optimizer}-12")
    resumed: Path = train(trainings, f"{optimizer}-12", 2, 2, **options)
    assert outcome(resumed) == outcome(one)
