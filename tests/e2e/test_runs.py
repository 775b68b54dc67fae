"""Whole runs: what is written, what a second start does not do again, and the quickstart's own
example.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from simpletuner.cli.checked_config import require_config_and_datasets
from simpletuner.config.load import try_load_config
from simpletuner.errors import ConfigError
from simpletuner.events.event_types import (
    ImageSaved,
    LossEvaluated,
    NoticeIssued,
    ScoresComputed,
    StageCompleted,
    StepCompleted,
    WeightsSaved,
)
from simpletuner.models.chroma.family import ChromaFamily
from tests.e2e.training_project import TrainingProject, read_events, read_losses
from tests.models.tiny_checkpoint import make_checkpoint
from tests.models.tiny_evaluation_models import make_clip

QUICKSTART = """{
  "model_type": "lora",
  "model_family": "chroma",
  "model_flavour": "base",
  "output_dir": "/workspace/chroma-output",   // comments are welcome
  "network_rank": 16,
  "learning_rate": 2.0e-4,
  "mixed_precision": "bf16",
  "gradient_checkpointing": true,
  "pretrained_model_name_or_path": null
}
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingProject, Path]:
    options = {
        "validation_disable": False, "validation_prompt": "a red square", "validation_resolution": "64",
        "validation_num_inference_steps": 2, "validation_step_interval": 4, "validation_guidance_real": 2.0,
        "validation_negative_prompt": "blurry", "eval_steps_interval": 3, "ema_validation": "comparison",
    }  # fmt: skip
    workspace = TrainingProject(tmp_path_factory.mktemp("drawn"), **options)
    return workspace, workspace.train()


def test_everything_a_run_promises_is_there(drawn: tuple[TrainingProject, Path]) -> None:
    _, run_dir = drawn
    happened = read_events(run_dir)
    assert [event.step for event in happened if isinstance(event, StepCompleted)] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    pictures = [event for event in happened if isinstance(event, ImageSaved)]
    assert {(event.step, event.weights) for event in pictures} == {
        (0, "base"), (4, "trained"), (4, "ema"), (6, "trained"), (6, "ema"), (6, "strength 0.5"),
    }  # fmt: skip
    for event in pictures:
        with Image.open(run_dir / event.path) as image:
            assert image.size == (64, 64)
            assert image.info["prompt"] == "a red square"
    measured = [(event.step, event.split) for event in happened if isinstance(event, LossEvaluated)]
    assert measured == [(step, split) for step in (0, 3, 6) for split in ("eval", "train")]
    assert all(
        event.change == 0
        for event in happened
        if isinstance(event, LossEvaluated) and event.step == 0
    )
    assert {event.path for event in happened if isinstance(event, WeightsSaved)} >= {
        "checkpoint-2", "checkpoint-4", "checkpoint-6", "pytorch_lora_weights.safetensors",
        "ema/pytorch_lora_weights.safetensors",
    }  # fmt: skip
    report = (run_dir / "report.html").read_text()
    assert "a red square" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert json.loads((run_dir / "exit.json").read_text())["status"] == "done"
    assert json.loads((run_dir / "config.json").read_text())["lora_rank"] == 2
    assert (run_dir / "images" / "before_after.png").is_file()


def test_nothing_is_written_into_the_dataset(drawn: tuple[TrainingProject, Path]) -> None:
    workspace, _ = drawn
    names = {path.suffix for path in (workspace.root / "pictures").rglob("*")}
    assert names == {".png", ".txt"}


def test_second_start_loads_no_encoder_and_draws_nothing_again(
    drawn: tuple[TrainingProject, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, run_dir = drawn
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "images").rglob("*-64x64*.png")}

    def forbidden(*arguments: object) -> object:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(ChromaFamily, "load_text_encoder", forbidden)
    monkeypatch.setattr(ChromaFamily, "load_vae", forbidden)
    workspace.train()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_validation_images_start_from_images(drawn: tuple[TrainingProject, Path]) -> None:
    """From one image for every prompt, and from images of the eval dataset with their captions."""
    workspace, plain = drawn
    image = workspace.root / "held-out" / "picture-11.png"  # 80x64
    shared = {"max_train_steps": 1, "validation_step_interval": 1, "validation_strengths": "none"}
    runs = {}
    for level in (0.5, 1.0):
        options = {"validation_image": str(image), "validation_denoise": level, **shared}
        out = workspace.root / f"from-image-{level}"
        runs[level] = workspace.train(
            output_dir=str(out), validation_using_datasets=True, **options
        )
    step = "images/step-000000"
    named = "validation-0-64x64.png"
    half, full, text = (
        Image.open(folder / step / named) for folder in (runs[0.5], runs[1.0], plain)
    )
    assert full.tobytes() == text.tobytes(), "denoise 1 ignores the image"
    assert half.tobytes() != text.tobytes()
    assert half.info["image"].startswith("picture-11.png (")
    assert half.info["denoise"] == "0.5"
    assert "image" not in text.info
    saved = [event for event in read_events(runs[0.5]) if isinstance(event, ImageSaved)]
    names = {event.prompt_id for event in saved if event.step == 0}
    assert names == {
        "validation", "from-1-picture-10", "from-2-picture-11", "from-3-picture-12",
    }  # fmt: skip
    (from_sample,) = [e for e in saved if (e.prompt_id, e.step) == ("from-2-picture-11", 0)]
    assert from_sample.prompt.startswith("a red square")
    with Image.open(runs[0.5] / from_sample.path) as shown:
        assert shown.info["image"] == "held/picture-11.png"
        assert shown.info["prompt"] == from_sample.prompt


def test_scores_of_the_base_and_of_checkpoints(drawn: tuple[TrainingProject, Path]) -> None:
    """CLIP scores twice per epoch of three steps; the held-out loss is switched off."""
    workspace, _ = drawn
    clip = make_clip(workspace.root / "clip")
    out = workspace.train(
        output_dir=str(workspace.root / "scored"),
        evaluation_type="clip,likeness,diversity",
        pretrained_evaluation_model_name_or_path=str(clip),
        eval_epoch_interval=2 / 3,
        eval_loss_disable=True,
        eval_steps_interval=None,
        max_train_steps=3,
        train_batch_size=1,
        validation_prompt=None,
        instance_prompt="zwx",
        evaluation_prompts=2,
    )
    happened = read_events(out)
    scored = [event for event in happened if isinstance(event, ScoresComputed)]
    # Six images and two to a step: an epoch is three steps, 2/3 of it two.
    assert [(event.metric, event.step, event.weights) for event in scored] == [
        (metric, step, weights)
        for step, weights in ((0, "base"), (2, "ema"), (3, "ema"))
        for metric in ("clip", "likeness", "diversity")
    ]
    assert set(scored[1].rates) == {"mean", "nearest"}
    assert all(event.rates["mean"][1] > 0 for event in scored), "standard errors over two prompts"
    assert scored[0].rates != scored[6].rates
    assert not any(isinstance(event, LossEvaluated) for event in happened)
    report = (out / "report.html").read_text(encoding="utf-8")
    for name in ("clip", "likeness", "diversity"):
        assert name in report


def test_a_validation_image_that_is_none_is_refused_first(
    drawn: tuple[TrainingProject, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _ = drawn
    note = workspace.root / "note.png"
    note.write_text("no image")
    monkeypatch.chdir(workspace.root)
    tried = try_load_config(
        [("validation_image", str(note))], workspace.root / "config.json", environ={}
    )
    with pytest.raises(ConfigError, match=r"--validation_image: .*note\.png: not an image"):
        require_config_and_datasets(tried)


def test_the_trained_lora_is_the_file_others_load(drawn: tuple[TrainingProject, Path]) -> None:
    _, run_dir = drawn
    tensors = load_file(run_dir / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw_bf16", "mixed_precision": "bf16"},
        {"optimizer": "adamw_schedulefree", "lr_scheduler": "constant"},
        {"optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "constant"},
        {"use_dora": True, "optimizer": "lion", "learning_rate": 1e-3},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_interval": 2,
            "optimizer": "adafactor",
        },
        {
            "loss_type": "huber",
            "chroma_sigma_density": "parabola",
            "input_perturbation": 0.1,
            "use_rslora": True,
        },
        {"mixflow_enabled": True, "mixflow_gamma": 0.4, "gradient_checkpointing": True},
        {"scheduled_sampling_probability": 1.0, "gradient_checkpointing": True},
        {
            "model_type": "full",
            "learning_rate": 1e-3,
            "lora_dropout": 0.0,
            "optimizer": "adamw_8bit",
            "optimizer_release_gradients": True,
            "max_grad_norm": 0,
            "gradient_accumulation_steps": 1,
        },
        {
            "model_type": "full",
            "base_model_default_dtype": "fp32",
            "mixed_precision": "bf16",
            "lora_dropout": 0.0,
        },
    ],
    ids=lambda options: "-".join(str(value) for value in options.values())[:50],
)
def test_other_ways_to_train(
    drawn: tuple[TrainingProject, Path], options: dict[str, object]
) -> None:
    workspace, _ = drawn
    name = "-".join(str(value) for value in options.values()).replace(".", "_")
    shared = {"validation_disable": True, "eval_steps_interval": None, "max_train_steps": 3}
    out = workspace.train(output_dir=str(workspace.root / name), **shared, **options)
    values = read_losses(out)
    assert sorted(values) == [1, 2, 3]
    assert all(torch.isfinite(torch.tensor(loss)) for loss, _, _ in values.values())
    if options.get("model_type") == "full":
        frozen = load_file(
            workspace.base_model_dir / "transformer" / "diffusion_pytorch_model.safetensors"
        )
        trained = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
        changed = {
            name
            for name, tensor in trained.items()
            if not torch.equal(tensor.float(), frozen[name].float())
        }
        assert changed
        assert not any(name.startswith("distilled_guidance_layer") for name in changed)


def test_gradient_checkpointing_changes_nothing(drawn: tuple[TrainingProject, Path]) -> None:
    workspace, _ = drawn
    shared = {"validation_disable": True, "max_train_steps": 2}
    runs = [
        workspace.train(
            output_dir=str(workspace.root / f"checkpointing-{on}"),
            gradient_checkpointing=on,
            **shared,
        )
        for on in (True, False)
    ]
    assert read_losses(runs[0]) == read_losses(runs[1])


def test_a_bucket_smaller_than_the_batch_trains_and_says_so(
    drawn: tuple[TrainingProject, Path],
) -> None:
    workspace, _ = drawn
    out = workspace.train(
        output_dir=str(workspace.root / "large-batch"),
        train_batch_size=16,
        validation_disable=True,
        max_train_steps=2,
    )
    assert any(
        isinstance(event, NoticeIssued) and "batch" in event.message for event in read_events(out)
    )


def environment(root: Path) -> dict[str, str]:
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def test_the_quickstart_example_starts_as_written(tmp_path: Path) -> None:
    """The config letter by letter, a dataset file beside it, weights from the hub's cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "hub" / "models--lodestones--Chroma1-Base"
    make_checkpoint(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    workspace = TrainingProject(tmp_path / "data")
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "config.json").write_text(QUICKSTART)
    shutil.copytree(workspace.root / "pictures", folder / "pictures")
    (folder / "multidatabackend.json").write_text(
        json.dumps(
            [{"id": "mine", "type": "local", "instance_data_dir": "pictures", "resolution": 64}]
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner", "train", f"--output_dir={tmp_path / 'out'}",
         "max_train_steps=2"],
        cwd=folder, env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["lora_rank"], config["learning_rate"]) == (16, 2e-4)


@pytest.mark.parametrize(
    "repository",
    [
        "someone/a-finetune-of-chroma",
        # Chroma itself is planned first, which takes ten seconds.
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_no_network_is_one_line(repository: str | None, tmp_path: Path) -> None:
    workspace = TrainingProject(tmp_path / "data")
    workspace.load_config(
        pretrained_model_name_or_path=repository, mixed_precision="bf16", base_model_precision="nf4",
        gradient_checkpointing=True, gradient_accumulation_steps=1,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner", "train", "--config", str(workspace.root / "config.json")],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 6, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "failed" not in done.stdout, "said once"


def test_rehearsal_finds_nothing_in_a_sound_config_and_leaves_nothing(
    drawn: tuple[TrainingProject, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from simpletuner.data.dataset_file import read_dataset_file
    from simpletuner.training.rehearse import rehearse

    workspace, _ = drawn
    loaded = workspace.load_config(output_dir=str(workspace.root / "not-made"))
    assert loaded.config.data.data_backend_config is not None
    assert (
        rehearse(
            loaded,
            read_dataset_file(Path(loaded.config.data.data_backend_config), loaded.config.data),
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "ready to train" in said
    assert "resume" in said
    assert not (workspace.root / "not-made").exists()


def test_rehearsal_tells_what_would_go_wrong(
    drawn: tuple[TrainingProject, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from simpletuner.data.dataset_file import read_dataset_file
    from simpletuner.training.rehearse import rehearse

    workspace, _ = drawn
    broken = workspace.root / "broken"
    shutil.copytree(workspace.root / "pictures", broken / "pictures")
    shutil.copytree(workspace.root / "held-out", broken / "held-out")
    shutil.copy(workspace.root / "multidatabackend.json", broken)
    (broken / "pictures" / "picture-1.txt").unlink()
    loaded = workspace.load_config(data_backend_config=str(broken / "multidatabackend.json"))
    backends = read_dataset_file(broken / "multidatabackend.json", loaded.config.data)
    assert rehearse(loaded, backends) == 3
    assert "picture-1" in capsys.readouterr().out


def test_stages_are_told(drawn: tuple[TrainingProject, Path]) -> None:
    _, run_dir = drawn
    stages = {event.stage for event in read_events(run_dir) if isinstance(event, StageCompleted)}
    assert {"encode text", "encode images"} <= stages


def test_a_bad_dataset_file_is_told_with_its_place(drawn: tuple[TrainingProject, Path]) -> None:
    from simpletuner.data.dataset_file import read_dataset_file

    workspace, _ = drawn
    loaded = workspace.load_config()
    path = workspace.root / "bad.json"
    path.write_text('[\n  {"id": "x", "type": "local", "instance_data_dri": "pictures"}\n]')
    with pytest.raises(ConfigError, match=r"bad.json:2:\d+.*instance_data_dir"):
        read_dataset_file(path, loaded.config.data)


def test_automatic_shift_knows_the_picture_size(drawn: tuple[TrainingProject, Path]) -> None:
    workspace, _ = drawn
    shared = {"validation_disable": True, "max_train_steps": 2}
    plain, shifted = (
        workspace.train(output_dir=str(workspace.root / name), **shared, **options)
        for name, options in (("plain", {}), ("auto-shift", {"flow_schedule_auto_shift": True}))
    )
    assert read_losses(plain) != read_losses(shifted)
