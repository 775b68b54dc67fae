"""Held-out images, early stopping and findings of whole runs on a tiny checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.cli.checked_config import require_config_and_datasets
from simpletuner.config.load import try_load_config
from simpletuner.config.schema import TuningOptions
from simpletuner.data import held_out_split
from simpletuner.errors import ConfigError, DataError
from simpletuner.events.event_log import read_events
from simpletuner.events.event_types import (
    Event,
    KnowledgeCompared,
    NoticeIssued,
    RunFinished,
    SampleLossesMeasured,
    ScoresComputed,
    StageStarted,
    StepCompleted,
    VerdictReached,
    WeightChangeMeasured,
    WeightsSaved,
)
from simpletuner.validation.evaluation_model import EvaluationModel
from simpletuner.validation.prompt_library import GENERAL_PROMPTS
from tests.e2e.training_project import TrainingProject, make_images, read_checkpoint_files
from tests.models.tiny_evaluation_models import make_clip

TINY = {
    "use_ema": False, "gradient_accumulation_steps": 1, "max_train_steps": 3,
    "checkpoint_step_interval": 2, "eval_sigma_count": 1, "lr_scheduler": "constant",
    "lr_warmup_steps": 0, "checkpoints_total_limit": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TrainingProject:
    made = TrainingProject(tmp_path_factory.mktemp("tuning"), **TINY)
    made.options["cache_dir"] = str(made.root / "cache")
    without_eval_dataset(made)
    return made


def without_eval_dataset(project: TrainingProject) -> None:
    path = project.root / "multidatabackend.json"
    sets = [one for one in json.loads(path.read_text()) if one.get("dataset_type") != "eval"]
    path.write_text(json.dumps(sets))


def train(project: TrainingProject, name: str, **options: object) -> list[Event]:
    run_dir = project.root / name
    project.train(output_dir=str(run_dir), **options)
    return [record.event for record in read_events(run_dir / "events.jsonl")]


def notices(events: list[Event]) -> str:
    return "\n".join(event.message for event in events if isinstance(event, NoticeIssued))


def state(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / f"checkpoint-{step}" / "state.json").read_text())


def rewrite_state(checkpoint: Path, content: dict[str, Any]) -> None:
    path = checkpoint / "state.json"
    path.write_text(json.dumps(content))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"]["state.json"] = {"bytes": path.stat().st_size, "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_split_is_held_out_and_kept_by_a_resumed_run(project: TrainingProject) -> None:
    events = train(project, "split", validation_split=0.34, num_train_loss_images=3)
    assert "held out 2 images of 6 (validation_split 0.34)" in notices(events)
    saved = state(project.root / "split", 2)
    assert len(saved["held_out"]) == 2
    assert set(saved["held_out"]).isdisjoint(saved["samples"])
    losses = {event.split: event for event in events if isinstance(event, SampleLossesMeasured)}
    assert set(losses["eval"].losses) == set(saved["held_out"])
    # A resumed run holds out what its checkpoint names, also where there are more images.
    make_images(project.root / "more", count=1, first=20)
    for path in (project.root / "more").iterdir():
        shutil.copy(path, project.root / "pictures")
    try:
        again = train(
            project, "split", validation_split=0.34, max_train_steps=4, resume_with_changes=True
        )
    finally:
        for path in (project.root / "more").iterdir():
            (project.root / "pictures" / path.name).unlink()
    assert state(project.root / "split", 4)["held_out"] == saved["held_out"]
    assert any(isinstance(event, VerdictReached) for event in again)


def test_a_run_of_an_earlier_version_resumes_with_all_its_images(project: TrainingProject) -> None:
    run_dir = project.root / "older"
    train(project, "older", max_train_steps=2)
    checkpoint = run_dir / "checkpoint-2"
    content = state(run_dir, 2)
    for name in ("held_out", *TuningOptions.model_fields):
        content.pop(name, None)
        content["config"].pop(name, None)
    rewrite_state(checkpoint, content)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(held_out_split, "DEFAULT_FROM_IMAGES", 2)  # the default would take an image
    try:
        events = train(project, "older", max_train_steps=3)
    finally:
        monkey.undo()
    assert "held out 1" not in notices(events)
    assert len(state(run_dir, 3)["samples"]) == 6


def test_folds_hold_out_every_image_once(project: TrainingProject) -> None:
    held = []
    for fold in ("1/2", "2/2"):
        name = f"fold-{fold[0]}"
        train(project, name, validation_fold=fold, max_train_steps=1, eval_at_start=False)
        held += state(project.root / name, 1)["held_out"]
    assert sorted(held) == sorted(state(project.root / "fold-1", 1)["samples"] | dict.fromkeys(
        state(project.root / "fold-1", 1)["held_out"]
    ))  # fmt: skip
    assert len(held) == len(set(held)) == 6


def test_what_holding_out_would_cost_is_offered(project: TrainingProject) -> None:
    run_dir = project.root / "older"
    events = [record.event for record in read_events(run_dir / "events.jsonl")]
    assert "no images are held out" in notices(events)
    assert "1 of 6 images would not be trained on" in notices(events)


def test_early_stopping_ends_the_run_and_exports_the_best_step(project: TrainingProject) -> None:
    """A rate that is far too high makes the held-out loss rise from the second measurement on."""
    options = {
        "validation_split": 0.34, "early_stopping": True, "early_stopping_patience": 2,
        "eval_steps_interval": 1, "checkpoint_step_interval": 50, "max_train_steps": 8,
        "learning_rate": 0.5,
    }  # fmt: skip
    events = train(project, "early", **options)
    run_dir = project.root / "early"
    last = max(event.step for event in events if isinstance(event, StepCompleted))
    assert last < 8
    assert f"the run ends at step {last} of 8" in notices(events)
    best = next(event for event in reversed(events) if isinstance(event, VerdictReached)).best_step
    exported = [event for event in events if isinstance(event, WeightsSaved) and event.programs]
    end = [event for event in events if isinstance(event, RunFinished)][-1]
    assert (end.step, end.status) == (last, "done")
    lora = "pytorch_lora_weights.safetensors"
    wanted = best or last
    assert exported[0].step == wanted
    saved = load_file(run_dir / f"checkpoint-{wanted}" / lora)
    final = load_file(run_dir / lora)
    assert all(torch.equal(final[name], saved[name]) for name in saved)
    # The same command finds that the run has ended; with more patience it trains on.
    again = train(project, "early", **options)
    assert len([event for event in again if isinstance(event, StepCompleted)]) == last
    longer = train(project, "early", **{**options, "early_stopping_patience": last + 1})
    assert max(event.step for event in longer if isinstance(event, StepCompleted)) > last


def test_a_run_that_stops_early_resumes_bit_equal(project: TrainingProject) -> None:
    options = {
        "validation_split": 0.34, "early_stopping": True, "early_stopping_patience": 30,
        "eval_steps_interval": 1, "checkpoint_step_interval": 2, "max_train_steps": 4,
    }  # fmt: skip
    train(project, "whole", **options)
    train(project, "parts", **{**options, "max_train_steps": 2})
    train(project, "parts", **options)
    whole, parts = (project.root / name / "checkpoint-4" for name in ("whole", "parts"))
    assert read_checkpoint_files(whole, ("weights", "optimizer")) == read_checkpoint_files(
        parts, ("weights", "optimizer")
    )
    companions = [state(folder.parent, 4)["companions"] for folder in (whole, parts)]
    assert companions[0] == companions[1]


def test_early_stopping_without_held_out_images_is_refused(project: TrainingProject) -> None:
    """Before an image is encoded, and where the options say it already, before torch is imported."""
    with pytest.raises(DataError, match="early_stopping needs held-out images"):
        train(project, "refused", early_stopping=True, cache_dir=str(project.root / "empty"))
    events = [record.event for record in read_events(project.root / "refused" / "events.jsonl")]
    stages = [event.stage for event in events if isinstance(event, StageStarted)]
    assert stages == ["scan"]
    project.load_config(early_stopping=True, validation_split=0)
    tried = try_load_config((), project.root / "config.json", environ={}, cwd=project.root)
    with pytest.raises(ConfigError, match="early_stopping needs held-out images"):
        require_config_and_datasets(tried)


def test_the_report_has_the_findings(project: TrainingProject) -> None:
    page = (project.root / "split" / "report.html").read_text(encoding="utf-8")
    section = page[page.index("<h2>Findings") : page.index("<h2>Held-out loss")]
    assert "the held-out loss" in section
    assert "training images on fixed noise" in section


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_rate_is_found_by_real_trials_and_used(project: TrainingProject) -> None:
    """learning_rate auto: trials with a kill between them, then the run with the rate."""
    config = project.root / "auto.json"
    run_dir = project.root / "auto"
    options = {
        **project.options, "learning_rate": "auto", "output_dir": str(run_dir),
        "max_train_steps": 60, "checkpoint_step_interval": 60, "train_batch_size": 2,
        "validation_split": 0.34,
    }  # fmt: skip
    del options["cache_dir"]
    config.write_text(json.dumps(options))
    command = [sys.executable, "-m", "simpletuner", "train", "--config", str(config)]
    first = subprocess.Popen(command, cwd=project.root)
    trial = project.root / "auto-tune" / "rate-3.2e-05"
    deadline = time.monotonic() + 300
    while not (trial / "events.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((project.root / "auto-tune" / "result.json").read_text())
    used = json.loads((run_dir / "config.json").read_text())
    assert used["learning_rate"] == found["rate"]
    assert used["learning_rate_search"] is False
    assert found["cost"] <= 1.5
    assert found["images"] == 2
    again = subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "all 60 steps are complete" in again.stdout


def test_the_change_of_the_weights_is_measured_and_resumed(project: TrainingProject) -> None:
    """By hand: the norm of delta W over that of W, of all modules; the same after a resume."""
    events = [record.event for record in read_events(project.root / "split" / "events.jsonl")]
    measured = {event.step: event for event in events if isinstance(event, WeightChangeMeasured)}
    assert sorted(measured) == [2, 3, 4]
    assert measured[4].total > 0
    blocks = measured[4].blocks
    assert {"transformer_blocks.0", "single_transformer_blocks.0"} <= blocks.keys()
    assert min(blocks.values()) <= measured[4].total <= max(blocks.values())


def test_a_full_fine_tuning_is_measured_by_a_sample(project: TrainingProject) -> None:
    options = {"model_type": "full", "max_train_steps": 1, "learning_rate": 1e-3}
    options["lora_rank"] = options["lora_dropout"] = None
    events = train(project, "full", **options)
    changes = [event for event in events if isinstance(event, WeightChangeMeasured)]
    assert 1e-5 < changes[-1].total < 1.0  # AdamW moves each weight by the rate in its first step


def test_what_was_forgotten_is_compared_over_the_built_in_prompts(
    project: TrainingProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The own prompt is not scored. A resumed run compares with the base of the first start."""
    embedded: list[list[str]] = []
    embed_texts = EvaluationModel.embed_texts

    def embed(model: EvaluationModel, texts: Sequence[str]) -> torch.Tensor:
        embedded.append(list(texts))
        return embed_texts(model, texts)

    monkeypatch.setattr(EvaluationModel, "embed_texts", embed)
    options = {
        "evaluation_type": "retention", "evaluation_prompts": 3, "instance_prompt": "zwx",
        "pretrained_evaluation_model_name_or_path": str(make_clip(project.root / "clip")),
        "validation_disable": False, "validation_prompt": "an own prompt", "eval_loss_disable": True,
        "validation_num_inference_steps": 1, "validation_guidance_real": 1.0,
        "validation_resolution": "64", "validation_step_interval": 99, "disable_benchmark": False,
        "learning_rate": 0.1, "max_train_steps": 1, "checkpoint_step_interval": 1,
    }  # fmt: skip
    events = train(project, "forgetting", **options)
    events = train(project, "forgetting", **{**options, "max_train_steps": 2})
    assert embedded == [list(GENERAL_PROMPTS.values())[:3]] * 3
    scores = [event for event in events if isinstance(event, ScoresComputed)]
    assert [(event.metric, event.step) for event in scores] == [
        ("retention", at) for at in range(3)
    ]
    before, first, second = (event.rates["mean"] for event in scores)
    compared = [event for event in events if isinstance(event, KnowledgeCompared)]
    for event, step, after in zip(compared, (1, 2), (first, second), strict=True):
        assert (event.step, event.metric, event.unit) == (step, "retention", "similarity")
        assert (event.before, event.before_se) == before[:2]
        assert (event.after, event.after_se) == after[:2]
        assert event.after != event.before
        assert event.change_se is not None
        assert event.change_se > 0
    page = (project.root / "forgetting" / "report.html").read_text(encoding="utf-8")
    assert "what the base could do (retention)" in page
    assert "similarity at step 2" in page
