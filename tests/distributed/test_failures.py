"""One process fails, is killed or is asked to stop: all end, the cause is named, nothing is lost."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.errors import DiskFull
from simpletuner.events.event_types import RunFailed, RunFinished, WarningIssued
from tests.distributed.harness import RankResult, run_ranks
from tests.distributed.test_replicated import STEPS, Trainings, outcome, train_project
from tests.e2e.training_project import read_events

# Phase -> module, what it calls in that phase, and the number of the call in which the fault occurs.
PHASES = {
    "scan": ("simpletuner.training.shared_scan", "scan_datasets", 1),
    "encode": ("simpletuner.cache.tensor_store", "write_shard", 1),
    "load": ("simpletuner.training.train_state", "attach_trainable_parameters", 1),
    "forward": ("simpletuner.training.loop", "compute_losses", 2),
    "reduce": ("simpletuner.training.gradient_sum", "make_buckets", 2),
    "evaluate": ("simpletuner.training.evaluation_callbacks", "choose_samples", 1),
    "validate": ("simpletuner.validation.image_validator", "generate_latents", 2),
    "save": ("simpletuner.training.checkpointer.checkpoint", "save_checkpoint", 2),
    # The files of the second checkpoint, one after the other, and the sync after each of them.
    "weights": ("simpletuner.training.checkpointer.checkpoint", "write_tensors", 4),
    "optimizer": ("simpletuner.training.checkpointer.checkpoint", "write_tensors", 5),
    "average": ("simpletuner.training.checkpointer.checkpoint", "write_tensors", 6),
    "manifest": ("simpletuner.training.checkpointer.checkpoint", "_sync", 14),
    "export": ("simpletuner.training.exporter.lora_io", "save_adapter", 4),
}
IMAGES = {
    "validation_disable": False,
    "validation_prompt": "a red square",
    "validation_resolution": "64",
    "validation_num_inference_steps": 1,
    "validation_guidance_real": 1.0,
    "validation_step_interval": 2,
    "num_validation_images": 2,
}
MAIN_ONLY = ("save", "weights", "optimizer", "average", "manifest", "export")


def train_with_fault(root: str, options: dict[str, Any], rank: int, phase: str, kind: str) -> None:
    os.environ["RUN_DIR"] = options["output_dir"]
    if int(os.environ["RANK"]) == rank:
        path, name, call = PHASES[phase]
        parent, _, last = path.rpartition(".")
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError:
            module = getattr(importlib.import_module(parent), last)
        setattr(module, name, fail_in_call(getattr(module, name), call, kind))
    train_project(root, options)


def fail_in_call(function: Callable[..., Any], call: int, kind: str) -> Callable[..., Any]:
    count = 0

    def wrapped(*args: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "requested":
                (Path(os.environ["RUN_DIR"]) / "control" / "stop").touch()
            if kind == "stopped":
                os.kill(os.getpid(), signal.SIGTERM)
            if kind == "bug":
                raise RuntimeError("a fault on purpose")
            if kind == "disk full":
                raise DiskFull("no space left, on purpose")
        return function(*args, **named)

    return wrapped


def run_with_fault(
    trainings: Trainings, name: str, rank: int, phase: str, kind: str
) -> tuple[Path, list[RankResult]]:
    run_dir = trainings.root / name
    options = {**trainings.options, "output_dir": str(run_dir), "gradient_accumulation_steps": 1}
    if phase in ("scan", "encode", "load"):
        options["cache_dir"] = str(trainings.root / f"{name}-cache")
    if phase == "validate":
        options |= IMAGES
    return run_dir, run_ranks(2, train_with_fault, str(trainings.root), options, rank, phase, kind)


def assert_next_start_completes(trainings: Trainings, run_dir: Path, whole: Path) -> None:
    trainings.train(run_dir.name, 2, gradient_accumulation_steps=1)
    assert outcome(run_dir) == outcome(whole)


@pytest.mark.parametrize(
    ("phase", "rank", "kind"),
    [
        ("scan", 1, "bug"),
        ("save", 0, "disk full"),
        pytest.param("encode", 1, "disk full", marks=pytest.mark.slow),
        pytest.param("forward", 1, "bug", marks=pytest.mark.slow),
        pytest.param("evaluate", 1, "disk full", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_one_process_ends_all_with_its_reason(
    phase: str, rank: int, kind: str, trainings: Trainings, whole: Path
) -> None:
    run_dir, results = run_with_fault(trainings, f"{phase}-{rank}-{kind}", rank, phase, kind)
    classes = {result.error[0] for result in results if result.error}
    if kind == "disk full":
        assert classes == {"DiskFull"}
    else:
        assert results[rank].error == ("RuntimeError", "a fault on purpose")
        assert results[1 - rank].error[0] == "SimpleTunerError"  # type: ignore[index]
    failed = next(e for e in reversed(read_events(run_dir)) if isinstance(e, RunFailed))
    assert "on purpose" in failed.error
    assert failed.error.startswith("process 1: ") == (rank == 1)
    end = json.loads((run_dir / "exit.json").read_text())
    assert end["message"] == failed.error
    assert end["exit_code"] == (5 if kind == "disk full" else 1)
    assert_next_start_completes(trainings, run_dir, whole)


@pytest.mark.parametrize(
    ("phase", "rank"),
    [
        ("forward", 1),
        ("save", 0),
        pytest.param("encode", 1, marks=pytest.mark.slow),
        pytest.param("load", 0, marks=pytest.mark.slow),
        pytest.param("reduce", 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_costs_the_steps_since_the_checkpoint(
    phase: str, rank: int, trainings: Trainings, whole: Path
) -> None:
    run_dir, results = run_with_fault(trainings, f"killed-{phase}-{rank}", rank, phase, "killed")
    assert results[rank].exit_code == -signal.SIGKILL
    kind, message = results[1 - rank].error  # type: ignore[misc]
    assert kind == "ProcessLost"
    if rank == 1:
        assert "process 1 (pid" in message
        assert json.loads((run_dir / "exit.json").read_text())["exit_code"] == 13
    assert_next_start_completes(trainings, run_dir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["killed", "bug", "disk full"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_any_fault_in_any_phase_loses_nothing(
    phase: str, rank: int, kind: str, trainings: Trainings, whole: Path
) -> None:
    if phase in MAIN_ONLY and rank == 1:
        pytest.skip("only the main process does this")
    run_dir, results = run_with_fault(trainings, f"any-{phase}-{rank}-{kind}", rank, phase, kind)
    assert all(result.error or result.exit_code for result in results), results
    assert not list(run_dir.glob("checkpoint-*/.writing*"))
    assert_next_start_completes(trainings, run_dir, whole)


@pytest.mark.parametrize("kind", ["stopped", "requested"])
def test_a_stop_on_any_process_stops_all_after_the_same_step(
    kind: str, trainings: Trainings, whole: Path
) -> None:
    run_dir, results = run_with_fault(trainings, kind, 1, "forward", kind)
    message = f"stopped after step 2 of {STEPS}. Run the same command to resume"
    assert [result.error for result in results] == [("TrainingStopped", message)] * 2
    end = json.loads((run_dir / "exit.json").read_text())
    assert (end["exit_code"], end["status"]) == (75, "stopped")
    assert any(
        isinstance(event, RunFinished) and event.status == "stopped"
        for event in read_events(run_dir)
    )
    assert_next_start_completes(trainings, run_dir, whole)


def train_with_bad_loss(root: str, options: dict[str, Any]) -> None:
    from simpletuner.training import loop

    def losses(context: Any, batch: Any, *rest: Any) -> torch.Tensor:
        found = compute(context, batch, *rest)
        return found * float("nan") if int(os.environ["RANK"]) == 1 else found

    compute, loop.compute_losses = loop.compute_losses, losses
    train_project(root, options)


def test_a_loss_that_is_not_finite_names_the_samples_of_all_processes(
    trainings: Trainings, whole: Path
) -> None:
    run_dir = trainings.root / "nonfinite"
    options = {
        **trainings.options, "output_dir": str(run_dir), "gradient_accumulation_steps": 1,
        "max_train_steps": 1, "nonfinite_loss_patience": 1,
    }  # fmt: skip
    results = run_ranks(2, train_with_bad_loss, str(trainings.root), options)
    assert [result.error for result in results] == [None, None]
    (warning,) = [
        event.message
        for event in read_events(run_dir)
        if isinstance(event, WarningIssued) and "skipped" in event.message
    ]
    assert warning.count("(sigma ") == 4  # two micro-batches of two samples


def test_processes_must_see_the_same_run_folder(trainings: Trainings) -> None:
    other = trainings.root / "other"
    shutil.rmtree(other, ignore_errors=True)
    results = run_ranks(2, train_in_own_folder, str(trainings.root), trainings.options)
    assert {result.error[0] for result in results if result.error} == {"ConfigError"}
    assert "another folder for process 1" in str(results[0].error)


def train_in_own_folder(root: str, options: dict[str, Any]) -> None:
    folder = Path(root) / "other" / os.environ["RANK"]
    train_project(root, {**options, "output_dir": str(folder)})
