"""A resumed run is the run that was never interrupted: bit for bit, on the CPU."""

from __future__ import annotations

import copy as copy_module
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from simpletuner.cli import main
from simpletuner.errors import CheckpointError, RunLocked, TrainingDiverged, TrainingStopped
from simpletuner.events import run_history
from simpletuner.events.event_types import CheckpointSetAside, StepCompleted, WarningIssued
from simpletuner.events.formatting import describe_event
from simpletuner.training import checkpoint
from simpletuner.training.run_folder import RunFolder
from tests.cli.test_cli import BLOCKED_START
from tests.distributed.harness import CONTEXT
from tests.e2e.training_project import (
    TrainingProject,
    make_images,
    read_checkpoint_files,
    read_events,
    read_losses,
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingProject, Path]:
    workspace = TrainingProject(tmp_path_factory.mktemp("straight"))
    return workspace, workspace.train()


def interrupted(workspace: TrainingProject, at: int, name: str, **options: object) -> Path:
    """Run with a stop after `at` steps, then the same command again."""
    out = workspace.root / name
    shutil.rmtree(out, ignore_errors=True)

    def ask(event: object) -> None:
        if isinstance(event, StepCompleted) and event.step == at:
            (out / "control" / "stop").write_text("")

    with pytest.MonkeyPatch.context() as patch:
        from simpletuner.training import run as engine

        real = engine.build_sinks
        patch.setattr(engine, "build_sinks", lambda *arguments: [*real(*arguments), ask])
        assert isinstance(
            workspace.train_and_expect_error(output_dir=str(out), **options), TrainingStopped
        )
    assert json.loads((out / "exit.json").read_text())["exit_code"] == 75
    workspace.train(output_dir=str(out), **options)
    return out


@pytest.mark.parametrize("at", [1, 2, 5])
def test_resumed_equals_uninterrupted(straight: tuple[TrainingProject, Path], at: int) -> None:
    workspace, run_dir = straight
    resumed = interrupted(workspace, at, f"stopped-at-{at}")
    assert read_losses(resumed) == read_losses(run_dir)
    assert read_checkpoint_files(resumed / "checkpoint-6") == read_checkpoint_files(
        run_dir / "checkpoint-6"
    )
    final = "pytorch_lora_weights.safetensors"
    for name in (final, f"ema/{final}"):
        ours, theirs = load_file(resumed / name), load_file(run_dir / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_rollouts_change_the_training_and_resume_exactly(
    straight: tuple[TrainingProject, Path],
) -> None:
    """Their draws are addressed by the visit, and their ramp by the step."""
    workspace, plain = straight
    options = {
        "scheduled_sampling_probability": 1.0,
        "scheduled_sampling_ramp_steps": 4,
        "scheduled_sampling_start_step": 1,
    }
    rolled = workspace.train(output_dir=str(workspace.root / "rolled"), **options)
    assert read_losses(rolled)[1] == read_losses(plain)[1], "the ramp has not begun"
    weights = "pytorch_lora_weights.safetensors"
    assert (rolled / weights).read_bytes() != (plain / weights).read_bytes()
    resumed = interrupted(workspace, 3, "rolled-stopped", **options)
    assert read_losses(resumed) == read_losses(rolled)
    assert read_checkpoint_files(resumed / "checkpoint-6") == read_checkpoint_files(
        rolled / "checkpoint-6"
    )
    off = {"scheduled_sampling_probability": 0.0, "scheduled_sampling_max_step_offset": 40}
    unchanged = workspace.train(output_dir=str(workspace.root / "rollouts-off"), **off)
    assert read_checkpoint_files(unchanged / "checkpoint-6") == read_checkpoint_files(
        plain / "checkpoint-6"
    )


FINER_CONTROL = {
    "lr_by_module": {r"single_transformer_blocks\..*": 0.25},
    "loraplus_lr_ratio": 4.0,
    "lora_rank_by_module": {r".*to_q": 2},
    "loss_weight_by_sigma": "0:0.5, 1:2",
}


def test_rates_ranks_and_weights_change_the_training_and_resume_exactly(
    straight: tuple[TrainingProject, Path],
) -> None:
    workspace, plain = straight
    whole = workspace.train(output_dir=str(workspace.root / "finer"), **FINER_CONTROL)
    assert read_losses(whole) != read_losses(plain)
    resumed = interrupted(workspace, 3, "finer-stopped", **FINER_CONTROL)
    assert read_losses(resumed) == read_losses(whole)
    assert read_checkpoint_files(resumed / "checkpoint-6") == read_checkpoint_files(
        whole / "checkpoint-6"
    )
    other = {"loraplus_lr_ratio": 8.0, "max_train_steps": 7}
    refused = workspace.train_and_expect_error(output_dir=str(whole), **{**FINER_CONTROL, **other})
    assert isinstance(refused, CheckpointError)
    assert "loraplus_lr_ratio" in str(refused)


def test_cold_optimizer_is_not_the_same_run(straight: tuple[TrainingProject, Path]) -> None:
    """The test above can fail: without the optimizer's state the run is another one."""
    workspace, run_dir = straight
    cold = workspace.root / "cold"
    shutil.copytree(run_dir, cold)
    for folder in checkpoint.list_checkpoints(cold):
        if checkpoint.checkpoint_step(folder) > 2:
            shutil.rmtree(folder)
    folder = cold / "checkpoint-2"
    tensors = load_file(folder / "optimizer.safetensors")
    save_file(
        {name: tensor * 0 for name, tensor in tensors.items()}, folder / "optimizer.safetensors"
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "optimizer.safetensors"
    manifest["files"][path.name] = {
        "bytes": path.stat().st_size,
        "sha256": checkpoint._sha256(path),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    workspace.train(output_dir=str(cold))
    assert (
        read_checkpoint_files(cold / "checkpoint-6")["weights"]
        != read_checkpoint_files(run_dir / "checkpoint-6")["weights"]
    )


def test_a_damaged_newest_checkpoint_costs_only_its_steps(
    straight: tuple[TrainingProject, Path],
) -> None:
    workspace, run_dir = straight
    out = workspace.root / "damaged"
    shutil.copytree(run_dir, out)
    victim = out / "checkpoint-6" / "weights.safetensors"
    content = bytearray(victim.read_bytes())
    content[-5] ^= 4
    victim.write_bytes(content)
    workspace.train(output_dir=str(out))
    assert any(isinstance(event, CheckpointSetAside) for event in read_events(out))
    assert (out / "damaged-checkpoint-6").is_dir()
    assert read_checkpoint_files(out / "checkpoint-6") == read_checkpoint_files(
        run_dir / "checkpoint-6"
    )


def test_another_training_is_not_continued_silently(straight: tuple[TrainingProject, Path]) -> None:
    workspace, run_dir = straight
    error = workspace.train_and_expect_error(output_dir=str(run_dir), learning_rate=3e-3)
    assert isinstance(error, CheckpointError)
    assert "learning_rate" in str(error)
    assert "--resume_from_checkpoint=never" in str(error)
    free = workspace.train(output_dir=str(run_dir), checkpoint_step_interval=3, max_train_steps=6)
    assert free == run_dir


@pytest.mark.parametrize("fields", [{"max_num_samples": 4}, {"repeats": 1}])
def test_changed_data_is_not_continued_silently(
    straight: tuple[TrainingProject, Path], fields: dict[str, int]
) -> None:
    workspace, run_dir = straight
    try:
        workspace.write_datasets(**fields)
        error = workspace.train_and_expect_error(output_dir=str(run_dir))
    finally:
        workspace.write_datasets()
    assert isinstance(error, CheckpointError)
    assert "dataset photos: '6 samples" in str(error)
    assert "--resume_with_changes" in str(error)


@pytest.fixture
def own(straight: tuple[TrainingProject, Path], tmp_path: Path) -> tuple[TrainingProject, Path]:
    """A copy of the project with its finished run, to change its files."""
    workspace, run_dir = straight
    copy = copy_module.copy(workspace)
    copy.root = tmp_path
    for name in ("pictures", "held-out"):
        shutil.copytree(workspace.root / name, tmp_path / name)
    copy.write_datasets()
    out = shutil.copytree(run_dir, tmp_path / "run")
    copy.options = {**workspace.options, "output_dir": str(out), "max_train_steps": 6}
    return copy, out


def repaint(path: Path) -> None:
    """Another content of the same name, size and length in bytes where that is possible."""
    with Image.open(path) as image:
        turned = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    turned.save(path)


def rename_caption(root: Path) -> None:
    (root / "pictures" / "picture-3.txt").write_text("something else\nanother caption 3")


def remove_image(root: Path) -> None:
    (root / "pictures" / "picture-3.png").unlink()
    (root / "pictures" / "picture-3.txt").unlink()


def change_image(root: Path) -> None:
    repaint(root / "pictures" / "picture-3.png")


CHANGES = {
    "content": (change_image, "images that have changed: photos/picture-3.png"),
    "captions": (rename_caption, "captions that have changed: photos/picture-3.png"),
    "removed": (remove_image, "samples that are missing: photos/picture-3.png"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_sample_is_noticed_and_named(
    own: tuple[TrainingProject, Path], kind: str
) -> None:
    workspace, out = own
    change, named = CHANGES[kind]
    workspace.train()  # the copy itself is the same training
    change(workspace.root)
    error = workspace.train_and_expect_error()
    assert isinstance(error, CheckpointError)
    assert named in str(error)
    workspace.train(resume_with_changes=True)
    told = [event.message for event in read_events(out) if isinstance(event, WarningIssued)]
    assert any("with changes to checkpoint-6" in text and named in text for text in told)
    in_history = [describe_event(event) for _, event in run_history.read_run_history(out).warnings]
    assert any(named in text for text in in_history), "what report and page show"


def test_a_dataset_that_is_added_or_moved_is_noticed(own: tuple[TrainingProject, Path]) -> None:
    workspace, _ = own
    file = workspace.root / "multidatabackend.json"
    photos, held = json.loads(file.read_text())
    make_images(workspace.root / "more", count=2, first=20)
    more = {**photos, "id": "more", "instance_data_dir": "more"}
    file.write_text(json.dumps([photos, held, more]))
    error = workspace.train_and_expect_error()
    assert "datasets: 'photos' in the checkpoint, now 'photos, more'" in str(error)
    assert "dataset more: None in the checkpoint, now '2 samples" in str(error)


def test_options_that_change_bits_are_noticed(own: tuple[TrainingProject, Path]) -> None:
    workspace, out = own
    error = workspace.train_and_expect_error(torch_num_threads=2)
    assert "torch_num_threads was 1, is 2" in str(error)
    workspace.train(vae_batch_size=1)  # with the cache as it was it changes nothing
    shutil.rmtree(out / "cache")
    error = workspace.train_and_expect_error(vae_batch_size=2)
    assert "vae_batch_size was 4, is 2" in str(error)


def test_lowering_the_learning_rate_is_one_flag(own: tuple[TrainingProject, Path]) -> None:
    workspace, out = own
    error = workspace.train_and_expect_error(learning_rate=1e-3, max_train_steps=8)
    assert "learning_rate was 0.01, is 0.001" in str(error)
    workspace.train(learning_rate=1e-3, max_train_steps=8, resume_with_changes=True)
    assert read_losses(out).keys() == set(range(1, 9))
    workspace.train(learning_rate=1e-3, max_train_steps=8)  # it is the run's own now


def test_a_checkpoint_of_an_earlier_version_resumes(own: tuple[TrainingProject, Path]) -> None:
    workspace, out = own
    checkpoint_dir = out / "checkpoint-6"
    state = json.loads((checkpoint_dir / "state.json").read_text())
    digest = state["identity"].pop("dataset photos")
    assert digest.startswith("6 samples")
    state.pop("samples")
    state["identity"].pop("datasets")
    state["identity"]["pictures and captions"] = "6 samples, of another version"
    write_state(checkpoint_dir, state)
    error = workspace.train_and_expect_error()
    now = str(error).split("now '")[1].split("'")[0]
    assert "pictures and captions" in str(error)
    assert "dataset photos" not in str(error)
    state["identity"]["pictures and captions"] = now
    state["identity"]["base weights"] = state["identity"]["base weights"][:120]
    write_state(checkpoint_dir, state)
    workspace.train()


def write_state(folder: Path, state: dict[str, object]) -> None:
    data = json.dumps(state).encode()
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_never_moves_earlier_results_aside(straight: tuple[TrainingProject, Path]) -> None:
    workspace, run_dir = straight
    out = workspace.root / "anew"
    shutil.copytree(run_dir, out)
    workspace.train(
        output_dir=str(out), resume_from_checkpoint="never", learning_rate=3e-3, max_train_steps=2
    )
    assert (out / "earlier-1" / "checkpoint-6").is_dir()
    assert (out / "checkpoint-2").is_dir()


def test_must_resume_refuses_an_empty_folder(
    tmp_path: Path, straight: tuple[TrainingProject, Path]
) -> None:
    workspace, _ = straight
    assert isinstance(
        workspace.train_and_expect_error(
            output_dir=str(tmp_path / "empty"), resume_from_checkpoint="must"
        ),
        CheckpointError,
    )


def test_two_runs_never_share_a_folder(straight: tuple[TrainingProject, Path]) -> None:
    workspace, run_dir = straight
    with RunFolder(run_dir):
        assert isinstance(workspace.train_and_expect_error(output_dir=str(run_dir)), RunLocked)


def test_divergence_names_the_samples_and_keeps_the_checkpoint(
    straight: tuple[TrainingProject, Path],
) -> None:
    workspace, _ = straight
    out = workspace.root / "diverged"
    options = {
        "learning_rate": 0.9,
        "lr_scheduler": "constant",
        "max_grad_norm": 0,
        "optimizer": "adamw",
    }
    with pytest.MonkeyPatch.context() as patch:
        from simpletuner.training import loop

        real = loop.compute_losses
        calls = []

        def poisoned(*arguments: object) -> object:
            calls.append(1)
            return real(*arguments) * (float("nan") if len(calls) > 6 else 1)

        patch.setattr(loop, "compute_losses", poisoned)
        error = workspace.train_and_expect_error(output_dir=str(out), **options)
    assert isinstance(error, TrainingDiverged)
    assert "photos/picture-" in str(error)
    assert checkpoint.find_damage(out / "checkpoint-2") is None
    assert json.loads((out / "exit.json").read_text())["exit_code"] == 4


def command(workspace: TrainingProject, out: Path) -> list[str]:
    workspace.load_config()
    return [
        sys.executable, "-m", "simpletuner", "train", "--config", str(workspace.root / "config.json"),
        f"--output_dir={out}", "--max_train_steps=30", "--checkpoint_step_interval=3",
    ]  # fmt: skip


def start_forked(words: list[str], cwd: Path) -> Any:
    """Start a command in a process of its own, which has the libraries imported."""
    process = CONTEXT.Process(target=run_command, args=(words[words.index("train") :], str(cwd)))
    process.start()
    return process


def run_command(words: list[str], cwd: str) -> None:
    os.chdir(cwd)
    sys.argv = ["simpletuner", *words]
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        main()


def storm(workspace: TrainingProject, kills: int, seed: int) -> None:
    """SIGKILL at random moments, start again, until done: the result is that of one calm run."""
    calm, torn = workspace.root / "calm", workspace.root / "torn"
    workspace.train(output_dir=str(calm), max_train_steps=30, checkpoint_step_interval=3)
    chance = random.Random(seed)
    for _ in range(kills):
        process = start_forked(command(workspace, torn), workspace.root)
        goal = chance.randint(1, 25)
        while process.is_alive() and max(read_losses(torn), default=0) < goal:
            time.sleep(0.02)
        process.kill()
        process.join()
    process = start_forked(command(workspace, torn), workspace.root)
    process.join()
    assert process.exitcode == 0
    assert read_losses(torn) == read_losses(calm)
    assert read_checkpoint_files(torn / "checkpoint-30") == read_checkpoint_files(
        calm / "checkpoint-30"
    )
    assert not list(torn.glob("damaged-*"))


def test_kill_storm_small(straight: tuple[TrainingProject, Path]) -> None:
    storm(straight[0], kills=2, seed=1)


@pytest.mark.slow
def test_kill_storm(tmp_path: Path) -> None:
    storm(TrainingProject(tmp_path), kills=20, seed=2)


# What a start with filled caches does not import: it encodes nothing, and asks no hub.
UNNEEDED = ("diffusers", "transformers", "huggingface_hub.hf_api", "httpx", "httpx2")


def test_sigterm_saves_and_leaves_with_its_own_code(straight: tuple[TrainingProject, Path]) -> None:
    workspace, whole = straight
    out = workspace.root / "terminated"
    words = [*command(workspace, out)[3:-2], f"--cache_dir={whole / 'cache'}"]
    process = subprocess.Popen(
        [
            sys.executable, "-c", BLOCKED_START.format(blocked=UNNEEDED), *words,
            "--max_train_steps=100000", "--checkpoint_step_interval=100000",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd=workspace.root,
    )  # fmt: skip
    while process.poll() is None and max(read_losses(out), default=0) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output.decode()
    assert checkpoint.find_latest_valid(out, lambda event: None) is not None
