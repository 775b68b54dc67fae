"""Runs with masks, regularisation datasets, second captions and the penalty."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from simpletuner.errors import CheckpointError, DataError
from simpletuner.events.event_types import NoticeIssued
from tests.e2e.test_resume import interrupted
from tests.e2e.training_project import (
    TrainingProject,
    make_images,
    read_checkpoint_files,
    read_events,
    read_losses,
)

LORA_FILE = "pytorch_lora_weights.safetensors"
PLAIN = {"max_train_steps": 4, "eval_loss_disable": True}
EVERYTHING = {
    **PLAIN,
    "masked_prior_preservation_weight": 0.5,
    "prior_loss_weight": 0.7,
    "diff_output_preservation": True,
    "diff_output_preservation_class": "blue",
    "modelspec_trigger": "red",
    "delta_weight_penalty": 0.01,
}


def write_mask(root: Path, number: int, level: int | None, folder: str = "masks") -> None:
    """Write a mask of one image, of a level of grey; None is white on the left and else black."""
    (root / folder).mkdir(exist_ok=True)
    with Image.open(root / "pictures" / f"picture-{number}.png") as image:
        width, height = image.size
    pixels = np.full((height, width), level or 0, np.uint8)
    if level is None:
        pixels[:, : width // 2] = 255
    Image.fromarray(pixels).save(root / folder / f"picture-{number}.png")


def write_datasets(project: TrainingProject, *sets: dict[str, Any], **fields: Any) -> None:
    """Write a dataset file; fields: of the images to learn."""
    common = {"caption_strategy": "textfile", "resolution": 64, "resolution_type": "pixel_area"}
    photos = {"id": "photos", "instance_data_dir": "pictures", **common, **fields}
    (project.root / "multidatabackend.json").write_text(json.dumps([photos, *sets]))


MASKS = {
    "id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks",
}  # fmt: skip
REGULARISATION = {
    "id": "reg", "instance_data_dir": "reg", "is_regularisation_data": True, "resolution": 64,
    "resolution_type": "pixel_area",
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TrainingProject:
    made = TrainingProject(tmp_path_factory.mktemp("preservation"))
    made.options["cache_dir"] = str(made.root / "cache")
    make_images(made.root / "reg", count=3, first=20)
    for number in range(6):
        write_mask(made.root, number, None)
    return made


@pytest.fixture(scope="module")
def everything(project: TrainingProject) -> Path:
    return train_with_everything(project, "everything")


def train_with_everything(project: TrainingProject, name: str, **options: Any) -> Path:
    write_datasets(project, MASKS, REGULARISATION, conditioning_data="masks")
    return project.train(output_dir=str(project.root / name), **{**EVERYTHING, **options})


def test_white_masks_train_bit_for_bit_like_none(project: TrainingProject) -> None:
    write_datasets(project)
    plain = project.train(output_dir=str(project.root / "plain"), **PLAIN)
    for number in range(6):
        write_mask(project.root, number, 255, "white")
    # Preservation outside of a white mask has nothing to preserve.
    write_datasets(project, {**MASKS, "instance_data_dir": "white"}, conditioning_data="masks")
    white = project.train(
        output_dir=str(project.root / "white-run"), **PLAIN, masked_prior_preservation_weight=1.0
    )
    write_datasets(project, MASKS, conditioning_data="masks")
    half = project.train(output_dir=str(project.root / "half-run"), **PLAIN)
    weights = [read_checkpoint_files(run / "checkpoint-4") for run in (plain, white, half)]
    assert weights[0] == weights[1]
    assert weights[0]["weights"] != weights[2]["weights"]
    assert read_losses(plain) == read_losses(white)


def test_a_run_with_everything_resumes_bit_for_bit(
    project: TrainingProject, everything: Path
) -> None:
    write_datasets(project, MASKS, REGULARISATION, conditioning_data="masks")
    resumed = interrupted(project, 2, "resumed", **EVERYTHING)
    assert read_losses(resumed) == read_losses(everything)
    assert read_checkpoint_files(resumed / "checkpoint-4") == read_checkpoint_files(
        everything / "checkpoint-4"
    )
    ours, theirs = (load_file(run / LORA_FILE) for run in (resumed, everything))
    assert ours.keys() == theirs.keys()


def test_the_run_names_what_it_used(everything: Path) -> None:
    notices = [
        event.message for event in read_events(everything) if isinstance(event, NoticeIssued)
    ]
    assert "photos: masks for 6 of 6 images" in notices
    card = (everything / "README.md").read_text().replace("\\", "")
    report = (everything / "report.html").read_text()
    assert "4 steps on 6 images" in card
    for line in (
        "Masks: 6 of 6 images of photos; outside of them towards the base's prediction, weight 0.5",
        "Regularisation: 3 images of reg towards the base's prediction, weight 0.7",
        "Class captions (blue) towards the base's prediction, weight 1",
        "Penalty on the squared norm of the change of the weights: 0.01",
    ):
        assert line in notices
        assert line in card, line
        assert html.escape(line) in report, line


def test_another_mask_is_other_data(project: TrainingProject, everything: Path) -> None:
    write_datasets(project, MASKS, REGULARISATION, conditioning_data="masks")
    changed = project.root / "changed"
    shutil.copytree(everything, changed)
    shutil.rmtree(changed / "checkpoint-4")
    before = (project.root / "masks" / "picture-2.png").read_bytes()
    try:
        write_mask(project.root, 2, 128)
        error = project.train_and_expect_error(output_dir=str(changed), **EVERYTHING)
    finally:
        (project.root / "masks" / "picture-2.png").write_bytes(before)
    assert isinstance(error, CheckpointError)
    assert "images that have changed: photos/picture-2.png" in str(error)


@pytest.mark.slow
def test_another_target_is_other_data(project: TrainingProject, everything: Path) -> None:
    towards_images = {**REGULARISATION, "regularisation_target": "images"}
    write_datasets(project, MASKS, towards_images, conditioning_data="masks")
    changed = project.root / "other-target"
    shutil.copytree(everything, changed)
    error = project.train_and_expect_error(output_dir=str(changed), **EVERYTHING)
    assert "regularisation towards" in str(error)
    images = project.train(output_dir=str(project.root / "towards-images"), **EVERYTHING)
    assert read_losses(images) != read_losses(everything)


def test_a_black_mask_is_listed(project: TrainingProject) -> None:
    write_mask(project.root, 0, 0, "black")
    for number in range(1, 6):
        write_mask(project.root, number, 255, "black")
    write_datasets(project, {**MASKS, "instance_data_dir": "black"}, conditioning_data="masks")
    out = project.root / "black-run"
    error = project.train_and_expect_error(output_dir=str(out), **PLAIN)
    assert isinstance(error, DataError)
    assert "1 of 6 images cannot be used" in str(error)
    assert "its mask is black where the image is cropped" in str(error)
    project.train(output_dir=str(out), **PLAIN, max_bad_sample_fraction=0.5)
    assert '"mask_black"' in (out / "rejected.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "delta_weight_penalty": 0.0, "lora_format": "none"},
        {"lora_init_type": "pissa"},
        {"lora_type": "lycoris", "lora_rank": None,
         "lycoris_config": {"algo": "lokr", "linear_dim": 4, "linear_alpha": 4}},
        {"mixed_precision": "bf16", "base_model_precision": "int8"},
        {"mixflow_enabled": True, "optimizer_release_gradients": True, "gradient_accumulation_steps": 1,
         "max_grad_norm": 0},
        {"scheduled_sampling_probability": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_with_other_adapters_and_options(project: TrainingProject, options: dict[str, Any]) -> None:
    name = f"with-{next(iter(options))}"
    run = train_with_everything(project, name, **options)
    losses = [loss for loss, *_ in read_losses(run).values()]
    assert len(losses) == 4
    assert all(0 < loss < 100 for loss in losses)
