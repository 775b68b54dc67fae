"""LoRA training on several processes equals training on one, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks, values
from tests.e2e.training_project import TrainingProject, read_checkpoint_files, read_losses

STEPS = 3


def train_project(root: str, options: dict[str, Any]) -> None:
    """Train with the datasets and the base model of the project in `root`."""
    project = TrainingProject.__new__(TrainingProject)
    project.root, project.options = Path(root), options
    project.train()


class Trainings:
    """Runs of one project, each in a folder of its own, with a shared cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.options = TrainingProject(
            root, max_train_steps=STEPS, checkpoint_step_interval=1, checkpoints_total_limit=9,
            cache_dir=str(root / "cache"),
        ).options  # fmt: skip

    def train(self, name: str, processes: int, **options: Any) -> Path:
        """Train on that many processes, one included; return the run folder."""
        run_dir = self.root / name
        chosen = {**self.options, **options, "output_dir": str(run_dir)}
        values(run_ranks(processes, train_project, str(self.root), chosen))
        return run_dir

    def copy_checkpoint(self, source: Path, step: int, name: str) -> None:
        target = self.root / name / f"checkpoint-{step}"
        shutil.copytree(source / f"checkpoint-{step}", target)


def outcome(run_dir: Path) -> tuple[Any, ...]:
    return read_losses(run_dir)[STEPS], read_checkpoint_files(run_dir / f"checkpoint-{STEPS}")


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"))


@pytest.fixture(scope="module")
def on_one(trainings: Trainings) -> dict[int, Path]:
    """Micro-batches of a step -> the run on one process."""
    return {
        count: trainings.train(f"one-{count}", 1, gradient_accumulation_steps=count)
        for count in (2, 3, 4, 8)
    }


@pytest.mark.parametrize(("micro_batches", "processes"), [(2, 2), (4, 2), (4, 4), (3, 3), (8, 4)])
def test_a_run_on_several_processes_equals_one(
    micro_batches: int, processes: int, trainings: Trainings, on_one: dict[int, Path]
) -> None:
    run_dir = trainings.train(
        f"m{micro_batches}-n{processes}",
        processes,
        gradient_accumulation_steps=micro_batches // processes,
    )
    assert read_losses(run_dir) == read_losses(on_one[micro_batches])
    assert outcome(run_dir) == outcome(on_one[micro_batches])


@pytest.mark.parametrize(
    ("micro_batches", "processes"), [(2, 3), (2, 4), (3, 2), (3, 4), (4, 3), (8, 3)]
)
def test_a_resumed_run_keeps_the_micro_batches_of_its_step(
    micro_batches: int, processes: int, trainings: Trainings, on_one: dict[int, Path]
) -> None:
    name = f"resumed-m{micro_batches}-n{processes}"
    trainings.copy_checkpoint(on_one[micro_batches], 1, name)
    run_dir = trainings.train(name, processes, gradient_accumulation_steps=micro_batches)
    assert outcome(run_dir) == outcome(on_one[micro_batches])
