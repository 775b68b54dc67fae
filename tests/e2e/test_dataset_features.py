"""Each source and feature of a dataset trains the bundled model to the end, also when it is killed.

The killed run, resumed, has the bits of one that was not interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.data.image_plugins import load_decoder
from tests.data.conftest import bucket, endpoint, hub
from tests.data.image_server import ImageServer
from tests.data.source_servers import TOKEN, Hub, pack
from tests.distributed.test_replicated import Trainings
from tests.e2e.test_dataset_variation import CAPTIONS, CROPS, FIRST, SECOND, write_datasets
from tests.e2e.test_preservation import write_mask
from tests.e2e.test_sources import SOURCES, images, make_source, server
from tests.e2e.training_project import (
    TrainingProject,
    make_images,
    read_checkpoint_files,
    read_losses,
)

__all__ = ["bucket", "endpoint", "hub", "server"]
# Three trainings, each in a process of its own: on a busy machine more than the usual five minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 6
MASKS = {
    "id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks",
}  # fmt: skip
REGULARISATION = {"id": "reg", "instance_data_dir": "others", "is_regularisation_data": True}
RANDOM = {"crop": True, "crop_style": "random"}
FEATURES: dict[str, list[dict[str, Any]]] = {
    "shuffle and tag dropout": [{"caption_shuffle": CAPTIONS["caption_shuffle"]}],
    "filters": [{"caption_filter_list": ["another", "s/red/blue/"]}],
    "weights": [{"caption_weights": [5, 1]}],
    "random aspect": [{**RANDOM, "crop_aspect": "random"}],
    "several crops": [{**RANDOM, "crop_aspect": "square", "crops_per_image": 3}],
    "several shapes": [CROPS],
    "own buckets": [
        {"crop": True, "crop_aspect": "closest", "resolution_buckets": ["64x64", "128x64"]}
    ],
    "steps": [{"end_step": 3}, {"id": "later", "start_step": 3}],
    "epochs": [{"end_epoch": 1}, {"id": "later", "start_epoch": 2, "end_epoch": 9}],
    "noise levels": [{"timestep_sampling_offset": -1.0}],
    "batches": [{"train_batch_size": 3}],
    "all": [FIRST, SECOND],
    "masks beside images": [{"instance_data_dir": "masked"}],
    "masks of a dataset": [{"conditioning_data": "masks"}, MASKS],
    "regularisation": [{}, REGULARISATION],
    "masks and regularisation": [{"conditioning_data": "masks"}, MASKS, REGULARISATION],
}
# Options of the run that a feature needs.
OPTIONS: dict[str, dict[str, Any]] = {
    "masks of a dataset": {"masked_prior_preservation_weight": 0.5},
    "masks and regularisation": {"masked_prior_preservation_weight": 0.5, "prior_loss_weight": 0.7},
}


def command(folder: Path, name: str, **more: Any) -> list[str]:
    options = {
        "model_flavour": "nano", "model_type": "lora", "lora_rank": 2, "output_dir": name, "device": "cpu",
        "cache_dir": "cache", "max_train_steps": STEPS, "checkpoint_step_interval": 1, "torch_num_threads": 1,
        "checkpoints_total_limit": 9, "validation_disable": "true", "mixed_precision": "no", "resolution": 64,
        "train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 5,
        "eval_sigma_count": 1,  # of the usual 8: most forward passes of a run would be of this loss
        **more,
    }  # fmt: skip
    config = folder / f"{name}.json"
    config.write_text(json.dumps({**options, "data_backend_config": "multidatabackend.json"}))
    return [sys.executable, "-m", "simpletuner", "train", "--config", str(config)]


@contextmanager
def start(folder: Path, name: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run whose output goes into a file; a test that fails does not leave it running."""
    with (folder / f"{name}.txt").open("wb") as output:
        process = subprocess.Popen(
            command(folder, name, **options),
            cwd=folder,
            env={"HF_HUB_OFFLINE": "1", **os.environ},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def last_words(folder: Path, name: str) -> str:
    return (folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace")[-3000:]


def finish(folder: Path, name: str, **options: Any) -> None:
    with start(folder, name, **options) as process:
        assert process.wait() == 0, last_words(folder, name)


def kill_after(folder: Path, name: str, checkpoint: str, **options: Any) -> None:
    """Start a run and kill it as soon as it has the checkpoint."""
    with start(folder, name, **options) as process:
        while not (folder / name / checkpoint).exists():
            assert process.poll() is None, last_words(folder, name)
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TrainingProject:
    project = TrainingProject.__new__(TrainingProject)
    project.root = tmp_path_factory.mktemp("features")
    make_images(project.root / "pictures", side=96)
    make_images(project.root / "held-out", count=2, first=10)
    make_images(project.root / "others", count=2, side=96, first=20)
    for number in range(6):
        write_mask(project.root, number, None)
    shutil.copytree(project.root / "pictures", project.root / "masked")
    for path in (project.root / "masks").iterdir():
        shutil.copy(path, project.root / "masked" / f"{path.stem}.mask.png")
    return project


def check(project: TrainingProject, name: str, **options: Any) -> None:
    folder = project.root
    finish(folder, f"{name}-straight", **options)
    kill_after(folder, f"{name}-killed", "checkpoint-2", **options)
    finish(folder, f"{name}-killed", **options)
    straight, killed = folder / f"{name}-straight", folder / f"{name}-killed"
    assert len(read_losses(straight)) == STEPS
    assert read_losses(killed) == read_losses(straight)
    checkpoints = [
        read_checkpoint_files(run / f"checkpoint-{STEPS}", ("weights", "optimizer"))
        for run in (straight, killed)
    ]
    assert checkpoints[0] == checkpoints[1]


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_trains_to_the_end_and_resumes(name: str, project: TrainingProject) -> None:
    write_datasets(project, *FEATURES[name])
    check(project, name.replace(" ", "-"), **OPTIONS.get(name, {}))


@pytest.mark.parametrize("kind", ["local", "tar", *SOURCES])
def test_a_source_trains_to_the_end_and_resumes(
    kind: str,
    project: TrainingProject,
    server: ImageServer,
    hub: Hub,
    bucket: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", hub.server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fields: dict[str, Any] = {}
    if kind == "tar":
        (project.root / "tars").mkdir()
        (project.root / "tars/a.tar").write_bytes(pack(images(project)))
        fields = {"type": "webdataset", "instance_data_dir": "tars"}
    elif kind != "local":
        fields = make_source(kind, project, server, hub, bucket)
    write_datasets(project, fields)
    check(project, f"from-{kind}")


@pytest.mark.parametrize("kind", ["JXL", "HEIF"])
def test_an_image_format_trains_to_the_end(kind: str, project: TrainingProject) -> None:
    if not load_decoder(kind):
        pytest.skip("its decoder is not installed")
    folder = project.root / kind
    folder.mkdir()
    for path in (project.root / "pictures").glob("*.png"):
        with Image.open(path) as image:
            image.save(folder / f"{path.stem}.{kind.lower()}", kind)
        (folder / path.name).with_suffix(".txt").write_text(path.with_suffix(".txt").read_text())
    write_datasets(project, {"instance_data_dir": kind})
    check(project, kind)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_the_same(processes: int, tmp_path: Path) -> None:
    trainings = Trainings(tmp_path)
    project = TrainingProject.__new__(TrainingProject)
    project.root = tmp_path
    write_datasets(project, {**FIRST, "end_step": 2}, {**SECOND, "start_step": 1})
    runs = [
        trainings.train(f"on-{count}", count, gradient_accumulation_steps=6 // count)
        for count in (1, processes)
    ]
    assert read_losses(runs[0]) == read_losses(runs[1])
    assert read_checkpoint_files(runs[0] / "checkpoint-3") == read_checkpoint_files(
        runs[1] / "checkpoint-3"
    )
