"""When a run that is started again is known to have nothing left to do, from its files alone."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.load import config_from_resolved, resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_config import DatasetConfig, DatasetFile
from simpletuner.training.finished_run import (
    describe_finished_run,
    describe_stored_choice,
    end_finished_run,
)

Change = Callable[[Path, Path], object]


def make_run(tmp_path: Path, **options: Any) -> tuple[RunConfig, DatasetFile, Path, Path]:
    """Return a finished run of 5 steps, its datasets, its folder and that of the images."""
    images, run_dir = tmp_path / "images", tmp_path / "run"
    (images / "inner").mkdir(parents=True)
    (images / "inner" / "a.png").write_bytes(b"1")
    given = {"output_dir": str(run_dir), "max_train_steps": 5, **options}
    run = config_from_resolved(given)
    (run_dir / "checkpoint-5").mkdir(parents=True)
    (run_dir / "checkpoint-5" / "state.json").write_text("{}")
    (run_dir / "pytorch_lora_weights.safetensors").write_bytes(b"1")
    stored = {**resolved_options(run), "gradient_checkpointing": 12}
    (run_dir / "config.json").write_text(json.dumps(stored))
    (run_dir / ".simpletuner-run.json").write_text("{}")
    record = {"exit_code": 0, "status": "done", "step": 5, "t": time.time() + 1}
    (run_dir / "exit.json").write_text(json.dumps(record))
    dataset = DatasetConfig("images", "image", images)
    return run, DatasetFile((dataset,), (), None), run_dir, images


def test_a_finished_run_is_reported(tmp_path: Path) -> None:
    run, backends, run_dir, _ = make_run(tmp_path)
    report = end_finished_run(run, backends)
    assert report is not None
    assert "all 5 steps are complete (pytorch_lora_weights.safetensors)" in report
    again = json.loads((run_dir / "exit.json").read_text())
    assert (again["status"], again["exit_code"], again["step"]) == ("done", 0, 5)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda out, images: (out / "exit.json").unlink(), id="killed"),
        pytest.param(lambda out, images: (out / "config.json").unlink(), id="no options"),
        pytest.param(
            lambda out, images: (out / "pytorch_lora_weights.safetensors").unlink(), id="no result"
        ),
        pytest.param(
            lambda out, images: (out / "checkpoint-5" / "state.json").unlink(), id="no checkpoint"
        ),
        pytest.param(lambda out, images: (out / "control").mkdir() or
                     (out / "control" / "save").touch(), id="a request"),
        pytest.param(lambda out, images: touch_later(images / "new.png"), id="an image more"),
        pytest.param(lambda out, images: touch_later(images / "inner" / "a.png"), id="changed"),
        pytest.param(lambda out, images: images.rename(images.with_name("moved")), id="no images"),
    ],
)  # fmt: skip
def test_what_may_have_changed_is_left_to_the_training(tmp_path: Path, change: Change) -> None:
    run, backends, run_dir, images = make_run(tmp_path)
    assert describe_finished_run(run, backends) is not None
    change(run_dir, images)
    assert describe_finished_run(run, backends) is None


def touch_later(path: Path) -> None:
    """Write a file after the end of the run, which make_run sets to one second from now."""
    record = path.parents[2 if path.parent.name == "inner" else 1] / "run" / "exit.json"
    fields = {**json.loads(record.read_text()), "t": time.time() - 1}
    record.write_text(json.dumps(fields))
    path.write_bytes(b"2")
    os.utime(path, (0, 0))  # as a copy that keeps the time of its original


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.5}, {"max_train_steps": 6}, {"resume_from_checkpoint": "never"},
     {"resume_from_checkpoint": "checkpoint-5"}, {"max_train_steps": None, "num_train_epochs": 1}],
    ids=str,
)  # fmt: skip
def test_other_options_are_left_to_the_training(tmp_path: Path, options: dict[str, Any]) -> None:
    run, backends, _, _ = make_run(tmp_path)
    other = config_from_resolved({**resolved_options(run), **options})
    assert describe_finished_run(run, backends) is not None
    assert describe_finished_run(other, backends) is None


@pytest.mark.parametrize(
    ("stored", "told"),
    [(12, "12 blocks compute their activations again"), (False, "all blocks keep"),
     (True, "none of the blocks keep"), ("auto", "the start of the training decides")],
)  # fmt: skip
def test_the_choice_of_checkpointed_blocks_is_told(
    tmp_path: Path, stored: object, told: str
) -> None:
    run, _, run_dir, _ = make_run(tmp_path)
    (run_dir / "config.json").write_text(json.dumps({"gradient_checkpointing": stored}))
    assert told in describe_stored_choice(run)
