"""Training on a sharded network (FSDP2) equals training on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.test_replicated import Trainings
from tests.e2e.training_project import read_checkpoint_files, read_losses

STEPS = 2
FULL = {"model_type": "full", "lr_scheduler": "constant", "lr_warmup_steps": 0}
BF16 = {"mixed_precision": "bf16"}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    made = Trainings(tmp_path_factory.mktemp("sharded"))
    made.options |= {"max_train_steps": STEPS, "eval_dataset_id": None}
    return made


def train(
    trainings: Trainings, name: str, processes: int, micro_batches: int, **options: Any
) -> Path:
    """Train sharded on that many processes; on one process that is the ordinary training."""
    return trainings.train(
        name,
        processes,
        gradient_accumulation_steps=micro_batches // processes,
        fsdp_enable=True,
        **options,
    )


def state_files(run_dir: Path, step: int = STEPS) -> dict[str, bytes]:
    return read_checkpoint_files(run_dir / f"checkpoint-{step}")


def largest_difference(run_dir: Path, other: Path) -> float:
    mine, theirs = (
        load_file(folder / f"checkpoint-{STEPS}" / "weights.safetensors")
        for folder in (run_dir, other)
    )
    assert mine.keys() == theirs.keys()
    return max(float((mine[name].double() - theirs[name].double()).abs().max()) for name in mine)


def base_bytes(run_dir: Path) -> tuple[str, int]:
    from tests.e2e.training_project import read_events

    (started,) = (event for event in read_events(run_dir) if event.kind == "run_started")
    return started.world.mode, started.world.base_bytes_per_rank


@pytest.mark.parametrize("precision", ["no_change", "int8", "nf4"])
def test_a_lora_on_a_sharded_base_has_the_bits_of_one_process(
    precision: str, trainings: Trainings
) -> None:
    options = {**BF16, "base_model_precision": precision, "gradient_checkpointing": True}
    one, two = (
        train(trainings, f"lora-{precision}-{count}", count, 2, **options) for count in (1, 2)
    )
    assert read_losses(two) == read_losses(one)
    assert state_files(two) == state_files(one)
