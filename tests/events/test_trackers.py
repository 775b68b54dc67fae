from __future__ import annotations

import subprocess
import sys
import types as modules
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.errors import MissingExtra
from simpletuner.events import trackers
from simpletuner.events.event_types import (
    ImageSaved,
    LossEvaluated,
    NoticeIssued,
    RunResumed,
    ScoresComputed,
    StepCompleted,
)
from simpletuner.events.tracker_names import TRACKER_NAMES

STEP = StepCompleted(3, 20, 0, 0.5, 1e-4, 1.25, 0.5, 1, 3.25)
EVALUATION = LossEvaluated(3, "d", "eval", 0.4, -0.1, 0.02, ((0.125, 0.6),), True)
SCORE = ScoresComputed(3, "shapes", "trained", 64, {"colour": (0.75, 0.05, 80)})
IMAGE = ImageSaved(3, "cat", "a cat", "cat.png", 42, 8, 8, "trained")


def picture(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "cat.png")


def test_tensorboard_reads_back_what_was_tracked(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    picture(tmp_path)
    (sink,) = trackers.make_trackers("tensorboard", tmp_path, "p", None, {"seed": 42})
    for event in (NoticeIssued("x"), STEP, EVALUATION, SCORE, IMAGE):
        sink(event)
    sink.close()  # type: ignore[attr-defined]
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    (loss,) = found.Scalars("train/loss")
    assert (loss.step, loss.value) == (3, 0.5)
    assert found.Scalars("eval/d/eval/sigma_0.125")[0].value == pytest.approx(0.6)
    assert found.Scalars("score/shapes/colour")[0].value == 0.75
    assert found.Scalars("score/shapes/colour_se")[0].value == pytest.approx(0.05)
    assert found.Scalars("device/memory_gib")[0].value == 3.25
    assert (
        found.Images("cat/8x8/42/trained")[0].encoded_image_string
        == (tmp_path / "cat.png").read_bytes()
    )


def test_tensorboard_forgets_an_abandoned_tail(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (sink,) = trackers.make_trackers("tensorboard", tmp_path, "p", None, {})
    for number in (1, 2, 3):
        sink(StepCompleted(number, 20, 0, 0.5, 1e-4, 1.0, 0.5, 1))
    sink(RunResumed(1, "checkpoint-1"))
    sink(StepCompleted(2, 20, 0, 0.25, 1e-4, 1.0, 0.5, 1))
    sink.close()  # type: ignore[attr-defined]
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]


class Recorder:
    """Stands in for a run of wandb or trackio: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[object, ...], dict[str, object]]] = []

    def note(self, name: str) -> object:
        def call(*args: object, **named: object) -> Recorder:
            self.told.append((name, args, named))
            return self

        return call


def fake(monkeypatch: pytest.MonkeyPatch, name: str, methods: tuple[str, ...]) -> Recorder:
    recorder = Recorder()
    module = modules.ModuleType(name)
    for method in methods:
        setattr(module, method, recorder.note(method))
        setattr(recorder, method, recorder.note(method))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, f"simpletuner.events.trackers.{name}", raising=False)
    return recorder


def test_wandb_is_told_with_our_own_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = fake(monkeypatch, "wandb", ("init", "log", "define_metric", "Image", "finish"))
    (sink,) = trackers.make_trackers("wandb", tmp_path, "project", None, {"seed": 42})
    for event in (STEP, EVALUATION, IMAGE):
        sink(event)
    sink.close()  # type: ignore[attr-defined]
    names = [name for name, _, _ in recorder.told]
    assert names == ["init", "define_metric", "log", "log", "Image", "log", "finish"]
    init = recorder.told[0][2]
    assert (init["project"], init["name"], init["resume"], init["config"]) == (
        "project", tmp_path.name, "allow", {"seed": 42},
    )  # fmt: skip
    logged = recorder.told[2][1][0]
    assert isinstance(logged, dict)
    assert (logged["step"], logged["train/loss"]) == (3, 0.5)


def test_trackio_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = fake(monkeypatch, "trackio", ("init", "log", "Image", "finish"))
    (sink,) = trackers.make_trackers("trackio", tmp_path, "project", "name", {})
    for event in (STEP, IMAGE):
        sink(event)
    sink.close()  # type: ignore[attr-defined]
    assert [name for name, _, _ in recorder.told] == ["init", "log", "Image", "log", "finish"]
    assert recorder.told[1][2] == {"step": 3}


@pytest.mark.parametrize("name", TRACKER_NAMES)
def test_a_missing_package_says_what_to_type(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, f"simpletuner.events.trackers.{name}", raising=False)
    with pytest.raises(MissingExtra, match=rf"pip install 'simpletuner\[{name}\]'"):
        trackers.make_trackers(f"none,{name}", tmp_path, "p", None, {})


def test_none_is_none(tmp_path: Path) -> None:
    assert trackers.make_trackers("none", tmp_path, "p", None, {}) == []


def test_listening_to_events_imports_neither_torch_nor_a_tracker() -> None:
    program = (
        "import sys, simpletuner.events.event_log, simpletuner.events.sinks, simpletuner.events.terminal_sink,"  # noqa: E501
        "simpletuner.events.webhook_sink, simpletuner.events.trackers, simpletuner.events.html_report;"
        "print([one for one in ('torch', 'tensorboard', 'wandb', 'trackio', 'tqdm') if one in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
