"""LoRA training on several processes equals training on one, bit for bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.events.event_types import Event, StepCompleted
from tests.distributed.harness import run_ranks, values
from tests.e2e.training_project import (
    TrainingProject,
    read_checkpoint_files,
    read_events,
    read_losses,
)

STEPS = 3
LONG_STEP_3, LONG_STEP_4 = (pytest.param(8, count, marks=pytest.mark.slow) for count in (3, 4))


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
            cache_dir=str(root / "cache"), eval_sigma_count=2, lora_format="none",
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


class RunsOnOne(dict[int, Path]):
    """Micro-batches of a step -> the run on one process, trained when it is first asked for."""

    def __init__(self, trainings: Trainings) -> None:
        super().__init__()
        self.trainings = trainings

    def __missing__(self, count: int) -> Path:
        self[count] = self.trainings.train(f"one-{count}", 1, gradient_accumulation_steps=count)
        return self[count]


@pytest.fixture(scope="module")
def on_one(trainings: Trainings) -> dict[int, Path]:
    return RunsOnOne(trainings)


@pytest.mark.parametrize(
    ("micro_batches", "processes"), [(2, 2), (4, 2), (4, 4), (3, 3), LONG_STEP_4]
)
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


def test_a_short_last_batch_is_one_of_the_step(trainings: Trainings) -> None:
    """Six images in batches of four: each step has a batch of four and one of two."""
    one, two = (
        trainings.train(
            f"short-{count}", count, train_batch_size=4, gradient_accumulation_steps=2 // count,
            max_train_steps=2,
        )
        for count in (1, 2)
    )  # fmt: skip
    steps = [event for event in read_events(one) if isinstance(event, StepCompleted)]
    assert [event.samples for event in steps] == [6, 6]
    assert read_losses(two) == read_losses(one)
    checkpoints = [read_checkpoint_files(run_dir / "checkpoint-2") for run_dir in (one, two)]
    assert checkpoints[0] == checkpoints[1]


@pytest.mark.parametrize(("micro_batches", "processes"), [(1, 2), (3, 2), (4, 3), LONG_STEP_3])
def test_a_resumed_run_keeps_the_micro_batches_of_its_step(
    micro_batches: int, processes: int, trainings: Trainings, on_one: dict[int, Path]
) -> None:
    name = f"resumed-m{micro_batches}-n{processes}"
    trainings.copy_checkpoint(on_one[micro_batches], 1, name)
    run_dir = trainings.train(name, processes, gradient_accumulation_steps=micro_batches)
    assert outcome(run_dir) == outcome(on_one[micro_batches])


def test_a_run_goes_from_two_processes_to_one_to_three(
    trainings: Trainings, on_one: dict[int, Path]
) -> None:
    """Each part trains one step, with its own division of the four micro-batches."""
    name = "two-one-three"
    for step, (processes, accumulation) in enumerate([(2, 2), (1, 4), (3, 4)], start=1):
        run_dir = trainings.train(
            name, processes, gradient_accumulation_steps=accumulation, max_train_steps=step,
            lr_scheduler="constant",
        )  # fmt: skip
    expected = trainings.train(
        "constant", 1, gradient_accumulation_steps=4, lr_scheduler="constant"
    )
    assert outcome(run_dir) == outcome(expected)


def test_another_accumulation_is_another_training(
    trainings: Trainings, on_one: dict[int, Path]
) -> None:
    trainings.copy_checkpoint(on_one[4], 1, "other-step")
    options = {**trainings.options, "gradient_accumulation_steps": 3}
    options["output_dir"] = str(trainings.root / "other-step")
    results = run_ranks(2, train_project, str(trainings.root), options)
    assert {result.error[0] for result in results if result.error} == {"CheckpointError"}
    assert "was 4, is 3 x 2 = 6" in str(results[0].error)


EVALUATIONS = {
    "validation_disable": False,
    "validation_prompt": "a red square",
    "num_validation_images": 3,
    "validation_resolution": "64,64x96",
    "validation_num_inference_steps": 2,
    "validation_guidance_real": 2.0,
    "validation_step_interval": 2,
    "eval_steps_interval": 1,
    "evaluation_type": "shapes",
    "evaluation_prompts": 5,
    "evaluation_step_interval": 2,
}


def test_evaluations_are_shared_out_and_equal(tmp_path: Path) -> None:
    """Encoding, held-out loss, scores and images of three processes, with caches of their own."""
    trainings = Trainings(tmp_path)
    one, three = (
        trainings.train(
            f"evaluated-{processes}", processes, **EVALUATIONS, cache_dir=str(tmp_path / f"{processes}"),
            max_train_steps=2, gradient_accumulation_steps=3 // processes,
        )
        for processes in (1, 3)
    )  # fmt: skip
    assert read_losses(one) == read_losses(three)
    assert evaluations(one) == evaluations(three)
    assert len(evaluations(one)["scored"]) == 2
    images = sorted(path.relative_to(one) for path in one.glob("images/step-*/*.png"))
    assert len(images) == 24  # two sizes, three seeds, two steps, with the average
    for image in images:
        assert (one / image).read_bytes() == (three / image).read_bytes(), image
    # Every process has encoded a share: each has written a shard of its own.
    for kind in ("text", "vae"):
        shards = [len(list((tmp_path / count / kind).glob("*/shard-*"))) for count in ("1", "3")]
        assert shards == [1, 3], kind
        assert not list((tmp_path / "3" / kind).glob("*/*.damaged"))


def evaluations(run_dir: Path) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {"evaluated": [], "scored": [], "image": []}
    for event in read_events(run_dir):
        if event.kind in found:
            found[event.kind].append(event)
    return {kind: sorted(events, key=repr) for kind, events in found.items()}


def test_full_fine_tuning_on_two_processes(tmp_path: Path) -> None:
    """The sum over processes rounds differently, so the weights agree to 1e-6 and not bit for bit."""
    trainings = Trainings(tmp_path)
    full = {"model_type": "full", "use_ema": False, "max_train_steps": 2, "learning_rate": 1e-4}
    one, two = (
        trainings.train(f"full-{count}", count, **full, gradient_accumulation_steps=4 // count)
        for count in (1, 2)
    )
    for step, found in read_losses(one).items():
        assert found == pytest.approx(read_losses(two)[step], rel=1e-6)
    weights = [
        load_file(run_dir / "checkpoint-2" / "weights.safetensors") for run_dir in (one, two)
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)
    start = load_file(one / "checkpoint-1" / "weights.safetensors")
    assert any(not torch.equal(start[name], weights[0][name]) for name in start)


def train_with_a_drifting_replica(root: str, options: dict[str, Any]) -> None:
    from simpletuner.training import loop

    def update(context: Any, step: int) -> None:
        original(context, step)
        if os.environ["RANK"] == "1":
            with torch.no_grad():
                next(iter(context.optimizer_step.params)).view(-1)[0] += 1e-6

    original, loop.update_weights = loop.update_weights, update
    train_project(root, options)


def test_replicas_that_differ_are_reported(trainings: Trainings) -> None:
    run_dir = trainings.root / "drifting"
    options = {**trainings.options, "max_train_steps": 1, "output_dir": str(run_dir)}
    values(run_ranks(2, train_with_a_drifting_replica, str(trainings.root), options))
    messages = [str(event) for event in read_events(run_dir) if event.kind == "warned"]
    assert [text for text in messages if "process 1 differ from those of process 0" in text]
