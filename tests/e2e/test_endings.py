"""How a run ends, what it leaves behind then, and how it goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from simpletuner.errors import CheckpointError, DiskFull, MissingExtra, SimpleTunerError, Stopped
from simpletuner.events import history
from simpletuner.events.types import (
    Evaluated,
    Event,
    ImageSaved,
    Noted,
    Resumed,
    RunStarted,
    StageStarted,
    Stepped,
    Warned,
)
from simpletuner.training import checkpoint, export
from simpletuner.training import run as engine
from tests.e2e.runs import Workspace, contents, events, losses

DRAWING = {
    "validation_disable": False, "validation_prompt": "a red square", "validation_resolution": "64",
    "validation_num_inference_steps": 1, "validation_step_interval": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    workspace = Workspace(tmp_path_factory.mktemp("endings"), **DRAWING)
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
        real = engine.sinks
        patch.setattr(engine, "sinks", lambda *arguments: [*real(*arguments), hear])
        yield
    assert met, "the moment never came"


def stopped(workspace: Workspace, out: Path, happens: Callable[[Event], bool]) -> SimpleTunerError:
    """Ask for a stop at a moment; hand back how the run ended."""
    with when(happens, lambda: (out / "control" / "stop").touch()):
        return workspace.fails(output_dir=str(out))


def ended(out: Path) -> tuple[int, str]:
    record = json.loads((out / "exit.json").read_text())
    return record["exit_code"], record["status"]


def copy_of(straight: tuple[Workspace, Path], name: str) -> tuple[Workspace, Path]:
    workspace, run_dir = straight
    return workspace, shutil.copytree(run_dir, workspace.root / name)


def test_a_refused_run_leaves_the_folder_as_it_was(straight: tuple[Workspace, Path]) -> None:
    workspace, out = copy_of(straight, "refused")
    kept = {name: (out / name).read_bytes() for name in ("config.json", "pytorch_lora_weights.safetensors")}
    steps = history.of_run(out).steps
    assert isinstance(workspace.fails(output_dir=str(out), learning_rate=3e-3), CheckpointError)
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert history.of_run(out).steps == steps
    assert not any(isinstance(event, StageStarted) for event in told_since(out, straight[1]))


def told_since(out: Path, before: Path) -> list[Event]:
    return events(out)[len(events(before)) :]


def test_the_record_of_a_resumed_run_is_whole(straight: tuple[Workspace, Path]) -> None:
    workspace, _ = straight
    out = workspace.root / "record"
    assert isinstance(stopped(workspace, out, lambda e: isinstance(e, Stepped) and e.step == 3), Stopped)
    workspace.train(output_dir=str(out))
    happened = events(out)
    assert [event.resumed_step for event in happened if isinstance(event, RunStarted)] == [0, 3]
    assert [event.step for event in happened if isinstance(event, Resumed)] == [3]
    assert sorted(history.of_run(out).steps) == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in happened if isinstance(event, Stepped)] == [1, 2, 3, 4, 5, 6]


def test_a_resume_by_name_makes_the_later_checkpoints_anew(straight: tuple[Workspace, Path]) -> None:
    workspace, out = copy_of(straight, "branch")
    before = contents(out / "checkpoint-6")
    workspace.train(output_dir=str(out), resume_from_checkpoint="checkpoint-2", learning_rate=3e-3)
    assert contents(out / "earlier-1" / "checkpoint-6") == before
    assert contents(out / "checkpoint-6")["weights"] != before["weights"]
    state = json.loads((out / "checkpoint-6" / "state.json").read_text())
    assert state["config"]["learning_rate"] == 3e-3
    assert json.loads((out / "config.json").read_text())["learning_rate"] == 3e-3


def test_an_average_begun_late_begins_at_the_trained_weights(straight: tuple[Workspace, Path]) -> None:
    workspace, _ = straight
    out = workspace.train(output_dir=str(workspace.root / "late"), use_ema=False, max_train_steps=4)
    workspace.train(
        output_dir=str(out), use_ema=True, ema_update_interval=100, resume_from_checkpoint="checkpoint-4"
    )
    weights = checkpoint.read_tensors(out / "checkpoint-4")["weights"]
    shadow = checkpoint.read_tensors(out / "checkpoint-6")["ema"]
    assert all(tensor.equal(weights[name]) for name, tensor in shadow.items())


@pytest.mark.parametrize("stage", ["encode text", "encode images", "draw", "evaluate eval"])
def test_a_stop_before_the_first_step(straight: tuple[Workspace, Path], stage: str) -> None:
    workspace, _ = straight
    out = workspace.root / stage.replace(" ", "-")
    error = stopped(workspace, out, lambda e: isinstance(e, StageStarted) and e.stage == stage)
    assert isinstance(error, Stopped)
    assert ended(out) == (75, "stopped")
    assert not checkpoint.existing(out)


def test_a_stop_while_drawing_loses_no_step_and_no_picture(straight: tuple[Workspace, Path]) -> None:
    workspace, run_dir = straight
    out = workspace.root / "drawing"
    done: list[int] = []

    def drawing(event: Event) -> bool:
        if isinstance(event, Stepped):
            done.append(event.step)
        return isinstance(event, StageStarted) and event.stage == "draw" and done[-1:] == [4]

    assert isinstance(stopped(workspace, out, drawing), Stopped)
    assert checkpoint.existing(out)[0].name == "checkpoint-4"
    assert not list((out / "images").glob("step-000004/*"))
    workspace.train(output_dir=str(out))
    assert losses(out) == losses(run_dir)
    assert contents(out / "checkpoint-6") == contents(run_dir / "checkpoint-6")
    drawn = {event.path for event in events(run_dir) if isinstance(event, ImageSaved)}
    assert drawn == {path.relative_to(out).as_posix() for path in (out / "images").glob("step-*/*.png")}


def test_pictures_missing_after_a_kill_are_drawn(straight: tuple[Workspace, Path]) -> None:
    """Killed between the checkpoint and its pictures."""
    workspace, out = copy_of(straight, "killed")
    shutil.rmtree(out / "checkpoint-6")
    for step in ("000004", "000006"):
        shutil.rmtree(out / "images" / f"step-{step}")
    workspace.train(output_dir=str(out))
    assert (out / "images" / "step-000004" / "validation-0-64x64.png").is_file()


def test_leaving_at_once(straight: tuple[Workspace, Path]) -> None:
    workspace, _ = straight
    out = workspace.root / "at-once"

    def interrupt() -> None:
        raise KeyboardInterrupt

    with when(lambda event: isinstance(event, Stepped) and event.step == 3, interrupt):
        assert isinstance(workspace.fails(output_dir=str(out)), Stopped)
    assert ended(out) == (75, "stopped")
    assert checkpoint.existing(out)[0].name == "checkpoint-2"


def test_a_report_that_cannot_be_written_fails_nothing(
    straight: tuple[Workspace, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, out = copy_of(straight, "no-report")

    def refuse(*arguments: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(engine, "write_report", refuse)
    workspace.train(output_dir=str(out))
    assert ended(out) == (0, "done")
    assert any(isinstance(event, Warned) and "report" in event.message for event in events(out))


def test_a_missing_package_is_in_the_exit_record(
    straight: tuple[Workspace, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, out = copy_of(straight, "no-tracker")

    def missing(*arguments: object) -> None:
        raise MissingExtra("pip install it")

    monkeypatch.setattr(engine.trackers, "make", missing)
    assert isinstance(workspace.fails(output_dir=str(out)), MissingExtra)
    assert ended(out) == (11, "failed")


def test_a_full_disk_is_a_sentence(straight: tuple[Workspace, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, out = copy_of(straight, "full-disk")

    def full(*arguments: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export.files, "save", full)
    assert isinstance(workspace.fails(output_dir=str(out)), DiskFull)
    assert ended(out) == (5, "failed")


def test_nothing_is_left_to_do(straight: tuple[Workspace, Path]) -> None:
    """A finished run again, with fewer steps than it has: the same weights, the best still marked."""
    workspace, out = copy_of(straight, "again")
    (out / "pytorch_lora_weights.safetensors").unlink()
    best = [event.step for event in history.of_run(out).evaluations.values() if event.best]
    workspace.train(output_dir=str(out), max_train_steps=4)
    told = told_since(out, straight[1])
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert not any(isinstance(event, (Evaluated, Stepped)) for event in told)
    assert any(isinstance(event, Noted) and "all 4 steps are done" in event.message for event in told)
    assert [event.step for event in history.of_run(out).evaluations.values() if event.best] == best
    assert any(isinstance(event, Warned) and "lr_scheduler cosine" in event.message for event in told)


def test_the_best_step_is_said(straight: tuple[Workspace, Path]) -> None:
    _, run_dir = straight
    log = (run_dir / "train.log").read_text()
    said = log[log.index("lowest held-out loss") :].splitlines()[0]
    assert said.endswith("checkpoint-6"), said


def test_a_best_step_without_a_checkpoint_is_warned_of(straight: tuple[Workspace, Path]) -> None:
    workspace, _ = straight
    out = workspace.train(output_dir=str(workspace.root / "uneven"), eval_steps_interval=3)
    told = [event.message for event in events(out) if isinstance(event, Warned)]
    assert any("eval_steps_interval 3" in message for message in told)
