"""Generations and LoRA files: commands without surprises, results with their settings, the trash."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError

from simpletuner.server.api_errors import ApiError
from simpletuner.server.generation_service import GenerationService
from simpletuner.server.lora_library import LoraLibrary
from simpletuner.server.schemas.generations import (
    GenerationRequest,
    LoraExportRequest,
    LoraPart,
)
from simpletuner.server.trash import Trash
from simpletuner.server.workspace import PathOutsideWorkspace
from tests.server.queue_harness import QueueHarness
from tests.server.run_folder_writer import RunFolderWriter

COMMAND = ("program",)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.harness = QueueHarness(folder)
        self.workspace = self.harness.workspace
        trash = Trash(self.workspace)
        jobs, runs = self.harness.jobs, self.harness.runs
        self.generations = GenerationService(self.workspace, jobs, trash, COMMAND)
        self.loras = LoraLibrary(self.workspace, runs, jobs, trash, COMMAND)
        self.trash = trash
        run = RunFolderWriter(self.workspace.output_dir / "fox").write_start()
        (run.path / "config.json").write_text('{"model_flavour": "nano"}')
        run.write_checkpoint(5)
        (run.path / "pytorch_lora_weights.safetensors").write_bytes(b"x")
        run.write_exit()

    def argv(self, job: str) -> list[str]:
        spec = self.harness.jobs._job_folder(job).read_spec()
        assert spec is not None
        return list(spec.argv)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path.resolve())


def test_a_request_becomes_a_command_of_the_queue(bench: Bench) -> None:
    lora = "output/fox/checkpoint-5/pytorch_lora_weights.safetensors"
    request = GenerationRequest(
        prompts=["--out=/etc", "a fox"],
        lora=lora,
        strengths=[0.5, 1],
        size="128",
        seed=7,
        negative_prompt="--config=x",
    )
    made = bench.generations.create(request)
    assert made.job is not None
    assert (made.job.state, made.job.kind) == ("queued", "generate")
    generations = bench.workspace.root / "generations"
    folder = generations / made.id
    assert bench.argv(made.job.id) == ["program", "generate", f"--requests={generations}"]
    assert json.loads((folder / "command.json").read_text()) == [
        "--prompt=--out=/etc",
        "--prompt=a fox",
        "--negative_prompt=--config=x",
        f"--lora={bench.workspace.root / lora}",
        "--size=128",
        "--strength=0.5,1",
        "--preview",
        "--steps=20",
        "--guidance=1",
        "--seed=7",
        "--count=1",
        f"--out={folder}",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"lora": "../x.safetensors"},
        {"lora": "/etc/passwd"},
        {"lora": "output/none.safetensors"},
        {"image": "/etc/hostname"},
        {"mask": "output/fox/config.json"},
        {"strengths": [0.5]},
    ],
)
def test_paths_outside_and_impossible_requests_are_refused(
    bench: Bench, change: dict[str, object]
) -> None:
    request = GenerationRequest.model_validate({"prompts": ["a"], "flavour": "nano", **change})
    with pytest.raises(ApiError) as caught:
        bench.generations.create(request)
    assert caught.value.status == 422
    assert bench.generations.list_newest() == []


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": []},
        {"prompts": [" "]},
        {"prompts": ["a"] * 17},
        {"count": 99},
        {"steps": 0},
        {"size": "512;rm"},
        {"strengths": [11]},
        {"group": "../.."},
        {"seed": -1},
    ],
)
def test_values_without_meaning_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GenerationRequest.model_validate({"prompts": ["a"], **change})


def test_images_are_listed_with_their_settings(bench: Bench) -> None:
    made = bench.generations.create(GenerationRequest(prompts=["a fox"], flavour="nano"))
    folder = bench.workspace.root / "generations" / made.id
    texts = PngInfo()
    for key, value in {"prompt": "a fox", "seed": "7", "strength": "0.5"}.items():
        texts.add_text(key, value)
    Image.new("RGB", (8, 6)).save(folder / "a.png", pnginfo=texts)
    (folder / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n")  # is being written
    [image] = bench.generations.get(made.id).images
    assert (image.prompt, image.seed, image.strength) == ("a fox", 7, 0.5)
    assert (image.width_px, image.height_px) == (8, 6)
    assert bench.generations.image_path(made.id, "a.png") == folder / "a.png"
    for wrong in ("request.json", "none.png/../request.json", "../x.png"):
        with pytest.raises((ApiError, PathOutsideWorkspace)):
            bench.generations.image_path(made.id, wrong)


def test_a_deleted_generation_is_cancelled_and_can_be_restored(bench: Bench) -> None:
    made = bench.generations.create(GenerationRequest(prompts=["a fox"], flavour="nano"))
    entry = bench.generations.delete(made.id)
    assert bench.generations.list_newest() == []
    assert bench.harness.jobs.get_queue().jobs == []
    bench.trash.restore(entry.id)
    [restored] = bench.generations.list_newest()
    assert restored.job is None
    for wrong in ("..", "x" * 12, ""):
        with pytest.raises(ApiError, match="no such generation"):
            bench.generations.get(wrong)


def test_one_job_generates_all_requests(bench: Bench) -> None:
    """Its network stays loaded; each request has a state of its own."""
    request = GenerationRequest(prompts=["a fox"], flavour="nano")
    first, second = bench.generations.create(request), bench.generations.create(request)
    [worker] = bench.harness.jobs.get_queue().jobs
    assert (worker.name, worker.kind, worker.state) == ("playground", "generate", "queued")
    folders = [bench.workspace.root / "generations" / made.id for made in (first, second)]
    (folders[0] / "state.json").write_text('{"state": "failed", "message": "no such file"}')

    def states() -> list[tuple[str, str]]:
        jobs = [bench.generations.get(made.id).job for made in (first, second)]
        return [(job.state, job.message) for job in jobs if job is not None]

    assert states() == [("failed", "no such file"), ("queued", "")]
    # A job that is closing takes nothing more, and a request that is added starts another one.
    lock = bench.harness.jobs._job_folder(worker.id).take_lock()
    try:
        assert bench.generations.create(request).job == bench.generations.get(second.id).job
        bench.generations.release_device()
        assert (folders[0].parent / ".stop").exists()
        (folders[0].parent / ".closed").touch()
        bench.generations.create(request)
        assert len(bench.harness.jobs.get_queue().jobs) == 2
    finally:
        os.close(lock)


def test_deleting_one_request_leaves_the_job_to_the_others(bench: Bench) -> None:
    request = GenerationRequest(prompts=["a fox"], flavour="nano")
    first, second = bench.generations.create(request), bench.generations.create(request)
    bench.generations.delete(first.id)
    [left] = bench.generations.list_newest()
    assert (left.id, left.job and left.job.state) == (second.id, "queued")
    bench.generations.delete(second.id)
    assert bench.harness.jobs.get_queue().jobs == []


def test_loras_of_runs_and_of_the_folder(bench: Bench) -> None:
    own = bench.workspace.root / "loras"
    own.mkdir()
    (own / "mean.safetensors").write_bytes(b"12")
    found = {lora.path: lora for lora in bench.loras.list_loras()}
    checkpoint = found["output/fox/checkpoint-5/pytorch_lora_weights.safetensors"]
    assert (checkpoint.name, checkpoint.step, checkpoint.flavour) == ("fox", 5, "nano")
    assert "output/fox/pytorch_lora_weights.safetensors" in found
    assert found["loras/mean.safetensors"].removable
    with pytest.raises(ApiError, match="belongs to a run"):
        bench.loras.delete(checkpoint.path)
    entry = bench.loras.delete("loras/mean.safetensors")
    assert not (own / "mean.safetensors").exists()
    bench.trash.restore(entry.id)
    for wrong in ("/etc/passwd", "../x.safetensors", "output/fox/config.json", ""):
        with pytest.raises(ApiError, match="no such LoRA"):
            bench.loras.find(wrong)


def test_two_checkpoints_are_averaged(bench: Bench) -> None:
    path = "output/fox/pytorch_lora_weights.safetensors"
    parts = [LoraPart(path=path, weight=0.5), LoraPart(path=path, weight=0.5)]
    job = bench.loras.start(LoraExportRequest(parts=parts, name="mean", rank=8))
    full = bench.workspace.root / path
    assert bench.argv(job.id) == [
        "program",
        "export",
        str(full),
        "--strength=0.5",
        f"--with={full}=0.5",
        "--format=diffusers",
        f"--output={bench.workspace.root / 'loras' / 'mean.safetensors'}",
        "--rank=8",
    ]
    (bench.workspace.root / "loras" / "mean.safetensors").touch()
    with pytest.raises(ApiError, match="already a mean"):
        bench.loras.start(LoraExportRequest(parts=parts, name="mean"))
    with pytest.raises(ApiError, match="needs a name"):
        bench.loras.start(LoraExportRequest(parts=parts))
    check = bench.loras.start(LoraExportRequest(action="check", parts=parts[:1]))
    assert bench.argv(check.id) == ["program", "export", str(full), "--check"]
    merged = bench.loras.start(LoraExportRequest(action="merge", parts=parts[:1], name="model"))
    assert "--format=diffusers" in bench.argv(merged.id)
    for name in ("../x", "a/b", ".hidden"):
        with pytest.raises(ValidationError):
            LoraExportRequest(parts=parts, name=name)
