"""How a run ends, what it leaves behind then, and how it resumes from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from simpletuner.errors import (
    CheckpointError,
    DiskFull,
    MissingExtra,
    SimpleTunerError,
    TrainingStopped,
)
from simpletuner.events import run_history
from simpletuner.events.event_types import (
    Event,
    ImageSaved,
    LossEvaluated,
    NoticeIssued,
    RunResumed,
    RunStarted,
    StageStarted,
    StepCompleted,
    WarningIssued,
)
from simpletuner.training import checkpoint, exporter
from simpletuner.training import run as engine
from tests.e2e.training_project import (
    TrainingProject,
    read_checkpoint_files,
    read_events,
    read_losses,
)

DRAWING = {
    "validation_disable": False, "validation_prompt": "a red square", "validation_resolution": "64",
    "validation_num_inference_steps": 1, "validation_step_interval": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingProject, Path]:
    workspace = TrainingProject(tmp_path_factory.mktemp("endings"), **DRAWING)
    return workspace, workspace.train()


@contextmanager
def when(happens: Callable[[Event], bool], act: Callable[[], None]) -> Iterator[None]:
    """Act at the first event that is meant."""
    met: list[Event] = []

    def hear(event: Event) -> None:
        if not met and happens(event):
            met.append(event)
            act()

    with pytest.MonkeyPatch.context() as patch:
        real = engine.build_sinks
        patch.setattr(engine, "build_sinks", lambda *arguments: [*real(*arguments), hear])
        yield
    assert met, "the moment never came"


def stopped(
    workspace: TrainingProject, out: Path, happens: Callable[[Event], bool]
) -> SimpleTunerError:
    """Ask for a stop at a moment; hand back how the run ended."""
    with when(happens, lambda: (out / "control" / "stop").touch()):
        return workspace.train_and_expect_error(output_dir=str(out))


def ended(out: Path) -> tuple[int, str]:
    record = json.loads((out / "exit.json").read_text())
    return record["exit_code"], record["status"]


def copy_of(straight: tuple[TrainingProject, Path], name: str) -> tuple[TrainingProject, Path]:
    workspace, run_dir = straight
    return workspace, shutil.copytree(run_dir, workspace.root / name)


def test_a_refused_run_leaves_the_folder_as_it_was(straight: tuple[TrainingProject, Path]) -> None:
    workspace, out = copy_of(straight, "refused")
    kept = {
        name: (out / name).read_bytes()
        for name in ("config.json", "pytorch_lora_weights.safetensors")
    }
    steps = run_history.read_run_history(out).steps
    assert isinstance(
        workspace.train_and_expect_error(output_dir=str(out), learning_rate=3e-3), CheckpointError
    )
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert run_history.read_run_history(out).steps == steps
    assert not any(isinstance(event, StageStarted) for event in told_since(out, straight[1]))


def told_since(out: Path, before: Path) -> list[Event]:
    return read_events(out)[len(read_events(before)) :]


def test_the_record_of_a_resumed_run_is_whole(straight: tuple[TrainingProject, Path]) -> None:
    workspace, _ = straight
    out = workspace.root / "record"
    assert isinstance(
        stopped(workspace, out, lambda e: isinstance(e, StepCompleted) and e.step == 3),
        TrainingStopped,
    )
    workspace.train(output_dir=str(out))
    happened = read_events(out)
    assert [event.resumed_step for event in happened if isinstance(event, RunStarted)] == [0, 3]
    assert [event.step for event in happened if isinstance(event, RunResumed)] == [3]
    assert sorted(run_history.read_run_history(out).steps) == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in happened if isinstance(event, StepCompleted)] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_resume_by_name_makes_the_later_checkpoints_anew(
    straight: tuple[TrainingProject, Path],
) -> None:
    workspace, out = copy_of(straight, "branch")
    before = read_checkpoint_files(out / "checkpoint-6")
    workspace.train(output_dir=str(out), resume_from_checkpoint="checkpoint-2", learning_rate=3e-3)
    assert read_checkpoint_files(out / "earlier-1" / "checkpoint-6") == before
    assert read_checkpoint_files(out / "checkpoint-6")["weights"] != before["weights"]
    state = json.loads((out / "checkpoint-6" / "state.json").read_text())
    assert state["config"]["learning_rate"] == 3e-3
    assert json.loads((out / "config.json").read_text())["learning_rate"] == 3e-3


def test_an_average_begun_late_begins_at_the_trained_weights(
    straight: tuple[TrainingProject, Path],
) -> None:
    workspace, _ = straight
    out = workspace.train(output_dir=str(workspace.root / "late"), use_ema=False, max_train_steps=4)
    workspace.train(
        output_dir=str(out),
        use_ema=True,
        ema_update_interval=100,
        resume_from_checkpoint="checkpoint-4",
    )
    weights = checkpoint.read_tensors(out / "checkpoint-4")["weights"]
    shadow = checkpoint.read_tensors(out / "checkpoint-6")["ema"]
    assert all(tensor.equal(weights[name]) for name, tensor in shadow.items())


@pytest.mark.parametrize("stage", ["encode text", "encode images", "draw", "evaluate eval"])
def test_a_stop_before_the_first_step(straight: tuple[TrainingProject, Path], stage: str) -> None:
    workspace, _ = straight
    out = workspace.root / stage.replace(" ", "-")
    error = stopped(workspace, out, lambda e: isinstance(e, StageStarted) and e.stage == stage)
    assert isinstance(error, TrainingStopped)
    assert ended(out) == (75, "stopped")
    assert not checkpoint.list_checkpoints(out)


def test_a_stop_while_drawing_loses_no_step_and_no_picture(
    straight: tuple[TrainingProject, Path],
) -> None:
    workspace, run_dir = straight
    out = workspace.root / "drawing"
    done: list[int] = []

    def drawing(event: Event) -> bool:
        if isinstance(event, StepCompleted):
            done.append(event.step)
        return isinstance(event, StageStarted) and event.stage == "draw" and done[-1:] == [4]

    assert isinstance(stopped(workspace, out, drawing), TrainingStopped)
    assert checkpoint.list_checkpoints(out)[0].name == "checkpoint-4"
    assert not list((out / "images").glob("step-000004/*"))
    workspace.train(output_dir=str(out))
    assert read_losses(out) == read_losses(run_dir)
    assert read_checkpoint_files(out / "checkpoint-6") == read_checkpoint_files(
        run_dir / "checkpoint-6"
    )
    drawn = {event.path for event in read_events(run_dir) if isinstance(event, ImageSaved)}
    assert drawn == {
        path.relative_to(out).as_posix() for path in (out / "images").glob("step-*/*.png")
    }


def test_pictures_missing_after_a_kill_are_drawn(straight: tuple[TrainingProject, Path]) -> None:
    """Killed between the checkpoint and its pictures."""
    workspace, out = copy_of(straight, "killed")
    shutil.rmtree(out / "checkpoint-6")
    for step in ("000004", "000006"):
        shutil.rmtree(out / "images" / f"step-{step}")
    workspace.train(output_dir=str(out))
    assert (out / "images" / "step-000004" / "validation-0-64x64.png").is_file()


def test_leaving_at_once(straight: tuple[TrainingProject, Path]) -> None:
    workspace, _ = straight
    out = workspace.root / "at-once"

    def interrupt() -> None:
        raise KeyboardInterrupt

    with when(lambda event: isinstance(event, StepCompleted) and event.step == 3, interrupt):
        assert isinstance(workspace.train_and_expect_error(output_dir=str(out)), TrainingStopped)
    assert ended(out) == (75, "stopped")
    assert checkpoint.list_checkpoints(out)[0].name == "checkpoint-2"


def test_a_report_that_cannot_be_written_fails_nothing(
    straight: tuple[TrainingProject, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, out = copy_of(straight, "no-report")

    def refuse(*arguments: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(engine, "write_report", refuse)
    workspace.train(output_dir=str(out))
    assert ended(out) == (0, "done")
    assert any(
        isinstance(event, WarningIssued) and "report" in event.message for event in read_events(out)
    )


def test_a_missing_package_is_in_the_exit_record(
    straight: tuple[TrainingProject, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, out = copy_of(straight, "no-tracker")

    def missing(*arguments: object) -> None:
        raise MissingExtra("pip install it")

    monkeypatch.setattr(engine.trackers, "make_trackers", missing)
    assert isinstance(workspace.train_and_expect_error(output_dir=str(out)), MissingExtra)
    assert ended(out) == (11, "failed")


def test_a_full_disk_is_a_sentence(
    straight: tuple[TrainingProject, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, out = copy_of(straight, "full-disk")

    def full(*arguments: object) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(exporter.lora_io, "save_adapter", full)
    assert isinstance(workspace.train_and_expect_error(output_dir=str(out)), DiskFull)
    assert ended(out) == (5, "failed")


def test_nothing_is_left_to_do(straight: tuple[TrainingProject, Path]) -> None:
    """A finished run again, with fewer steps than it has: the same weights, the best still marked."""
    workspace, out = copy_of(straight, "again")
    (out / "pytorch_lora_weights.safetensors").unlink()
    best = [
        event.step for event in run_history.read_run_history(out).evaluations.values() if event.best
    ]
    workspace.train(output_dir=str(out), max_train_steps=4)
    told = told_since(out, straight[1])
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert not any(isinstance(event, (LossEvaluated, StepCompleted)) for event in told)
    assert any(
        isinstance(event, NoticeIssued) and "all 4 steps are complete" in event.message
        for event in told
    )
    assert [
        event.step for event in run_history.read_run_history(out).evaluations.values() if event.best
    ] == best
    assert any(
        isinstance(event, WarningIssued) and "lr_scheduler cosine" in event.message
        for event in told
    )


def test_the_best_step_is_said(straight: tuple[TrainingProject, Path]) -> None:
    _, run_dir = straight
    log = (run_dir / "train.log").read_text()
    said = log[log.index("lowest held-out loss") :].splitlines()[0]
    assert said.endswith("checkpoint-6"), said


def test_a_best_step_without_a_checkpoint_is_warned_of(
    straight: tuple[TrainingProject, Path],
) -> None:
    workspace, _ = straight
    out = workspace.train(output_dir=str(workspace.root / "uneven"), eval_steps_interval=3)
    told = [event.message for event in read_events(out) if isinstance(event, WarningIssued)]
    assert any("eval_steps_interval 3" in message for message in told)
