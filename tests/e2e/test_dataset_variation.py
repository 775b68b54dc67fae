"""Runs whose captions, crops, batches and datasets change as they go: resumed, they are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from simpletuner.cli.checked_config import require_config_and_datasets
from simpletuner.config.load import try_load_config
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.errors import CheckpointError, ConfigError, DataError
from simpletuner.training.rehearse import (
    RehearsalFindings,
    reduce_config,
    scan_all,
    shrink_datasets,
)
from tests.e2e.test_resume import interrupted
from tests.e2e.training_project import TrainingProject, read_checkpoint_files, read_losses

CAPTIONS = {
    "caption_shuffle": {"enable": True, "count": 2, "split_on": "space", "tag_dropout": 0.2},
    "caption_filter_list": ["another"],
    "caption_weights": [2, 1],
}
CROPS = {
    "crop": True,
    "crop_style": "random",
    "crop_aspect": "random",
    "crop_aspect_buckets": [1.0, 2.0],
    "crops_per_image": 2,
}
FIRST = {"end_step": 3, "train_batch_size": 3, **CAPTIONS}
SECOND = {"id": "later", "start_step": 2, "timestep_sampling_offset": 0.7, **CROPS}


def write_datasets(project: TrainingProject, *sets: dict[str, Any]) -> None:
    common = {"instance_data_dir": "pictures", "resolution": 64}
    held = {"id": "held", "dataset_type": "eval", "instance_data_dir": "held-out"}
    entries = [*({"id": "photos", **common, **fields} for fields in sets), held]
    (project.root / "multidatabackend.json").write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TrainingProject:
    return TrainingProject(tmp_path_factory.mktemp("varied"))


@pytest.fixture(scope="module")
def straight(project: TrainingProject) -> Path:
    write_datasets(project, FIRST, SECOND)
    return project.train()


# Before, at and after the steps at which the datasets change.
@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_with_all_of_it_resumes_exactly(
    project: TrainingProject, straight: Path, at: int
) -> None:
    write_datasets(project, FIRST, SECOND)
    resumed = interrupted(project, at, f"stopped-{at}")
    assert read_losses(resumed) == read_losses(straight)
    assert read_checkpoint_files(resumed / "checkpoint-6") == read_checkpoint_files(
        straight / "checkpoint-6"
    )


def test_a_changed_schedule_is_not_the_same_run(project: TrainingProject, straight: Path) -> None:
    folder = project.root / "changed"
    shutil.copytree(straight, folder)
    write_datasets(project, {**FIRST, "end_step": 4}, SECOND)
    error = project.train_and_expect_error(output_dir=str(folder))
    assert isinstance(error, CheckpointError)
    assert "steps 1 to 4" in str(error)


def test_a_run_that_is_longer_than_its_datasets_is_refused(project: TrainingProject) -> None:
    write_datasets(project, FIRST)
    error = project.train_and_expect_error(output_dir=str(project.root / "short"))
    assert isinstance(error, DataError)
    assert "no dataset is active after step 3 (epoch" in str(error)
    assert "the run has 6 steps" in str(error)


def test_a_rehearsal_counts_images_and_uses_small_batches(project: TrainingProject) -> None:
    large = {**CROPS, "crop_aspect_buckets": None, "resolution_buckets": ["512x512", "512x256"]}
    write_datasets(project, FIRST, {**SECOND, **large, "train_batch_size": 8})
    loaded = project.load_config()
    backends = read_dataset_file(
        Path(str(loaded.config.data.data_backend_config)), loaded.config.data
    )
    findings = RehearsalFindings()
    counted = scan_all(loaded.config, backends, project.root / "cache", findings)
    assert counted.startswith("12 to train on in 3 buckets, 3 held out")
    first, second = (dataset.resize_crop for dataset in shrink_datasets(backends).train)
    assert (first.train_batch_size, second.train_batch_size) == (2, 2)
    assert (second.resolution_buckets, second.crop_aspect_buckets) == ((), (1.0, 2.0))


def test_a_rehearsal_writes_to_no_store(project: TrainingProject, tmp_path: Path) -> None:
    run = project.load_config(cache_remote="s3://mine/caches").config
    reduced = reduce_config(run, tmp_path / "rehearsal", RehearsalFindings())
    assert (run.cache.cache_remote, reduced.cache.cache_remote) == ("s3://mine/caches", None)


def test_noise_levels_of_a_list_cannot_be_moved(project: TrainingProject) -> None:
    write_datasets(project, FIRST, SECOND)
    project.load_config(flow_custom_timesteps="0.5,0.9")
    tried = try_load_config((), project.root / "config.json", environ={}, cwd=project.root)
    with pytest.raises(ConfigError, match=r"later\.timestep_sampling_offset moves a density"):
        require_config_and_datasets(tried)
