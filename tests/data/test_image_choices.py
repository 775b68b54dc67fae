"""Images that a dataset leaves out, and parts of images that it uses as if they were whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.config.schema import DataOptions
from simpletuner.data.crop_assignment import assign_crops
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.dataset_file import try_read_datasets
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.data.pixels import load_pixels
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.scan import ScanResult, scan_datasets
from simpletuner.errors import DataError
from simpletuner.events.event_types import Event, NoticeIssued

OPTIONS = DataOptions(max_bad_sample_fraction=0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of 400 x 300 px with noise, in a folder and a subfolder, with captions."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    generator = np.random.default_rng(1)
    for name in ("a", "b\u00e9", "more/c"):
        pixels = generator.integers(0, 255, (300, 400, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a caption")
    return folder


def read(folder: Path, **fields: Any) -> tuple[list[DatasetConfig], list[str]]:
    entry = {"id": "photos", "instance_data_dir": str(folder), **fields}
    datasets, problems = try_read_datasets([entry], folder.parent, OPTIONS)
    return list(datasets.train), [f"{problem.location}: {problem.message}" for problem in problems]


def scan(folder: Path, **fields: Any) -> tuple[ScanResult, list[str]]:
    events: list[Event] = []
    datasets, problems = read(folder, **fields)
    assert problems == []
    result = scan_datasets(datasets, OPTIONS, 1, events.append)
    notices = [event.message for event in events if isinstance(event, NoticeIssued)]
    return result, [notice for notice in notices if "enlarged" not in notice]


def test_excluded_images_are_left_out_and_do_not_count_as_bad(folder: Path) -> None:
    result, notices = scan(folder, exclude=["more/c.png", "be\u0301.png"])
    assert [item.sample.id for item in result.samples] == ["photos/a.png"]
    assert [(file.path, file.reason) for file in result.rejected] == [
        ("b\u00e9.png", "excluded"),
        ("more/c.png", "excluded"),
    ]
    assert notices == []


def test_a_name_that_the_dataset_does_not_have_is_a_notice(folder: Path) -> None:
    result, notices = scan(folder, exclude=["c.png"], crop_boxes={"gone.png": [0, 0, 99, 99]})
    assert len(result.samples) == 3
    assert notices == [
        "photos: exclude names 1 image that the dataset does not have: c.png",
        "photos: crop_boxes names 1 image that the dataset does not have: gone.png",
    ]


def test_a_dataset_without_any_image_left_is_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match="there is no image to train on"):
        scan(folder, exclude=["a.png", "b\u00e9.png", "more/c.png"])


def test_a_box_is_used_as_if_it_were_the_image(folder: Path) -> None:
    box = {"crop_boxes": {"a.png": [96, 32, 192, 256]}}
    result, _ = scan(folder, resolution=192, resolution_type="pixel", crop=False, **box)
    cropped = next(item for item in result.samples if item.sample.id == "photos/a.png")
    assert (cropped.bucket_px, cropped.resize_px, cropped.crop_px) == (
        (192, 256),
        (400, 300),
        (96, 32),
    )
    pixels = np.asarray(Image.open(folder / "a.png"))
    assert np.array_equal(load_pixels(cropped, OPTIONS), pixels[32:288, 96:288])
    assert (cropped.sample.width_px, cropped.sample.height_px) == (400, 300)


def test_the_crop_of_a_box_lies_inside_it() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        size = draw.randint(64, 4000), draw.randint(64, 4000)
        sides = [draw.randint(-(-side // 5), side) for side in size]
        box = (draw.randint(0, size[0] - sides[0]), draw.randint(0, size[1] - sides[1]), *sides)
        framing = ResizeCropConfig(
            resolution=draw.choice([128, 512, 1024]),
            crop=draw.random() < 0.5,
            crop_style=draw.choice(["center", "random", "corner"]),
            minimum_aspect_ratio=0.001,
            maximum_aspect_ratio=1000,
        )
        [(resize, corner, bucket)] = assign_crops(framing, size, "a", 1, 16, box)
        for axis in (0, 1):
            assert 0 <= corner[axis] <= resize[axis] - bucket[axis]
            pixel = size[axis] / resize[axis]  # of the resized image, in pixels of the file
            first, last = corner[axis] * pixel, (corner[axis] + bucket[axis]) * pixel
            assert first >= box[axis] - 1.01 * pixel
            assert last <= box[axis] + box[2 + axis] + 1.01 * pixel


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([300, 0, 101, 300], "is not inside the image of 400x300"),
        ([0, 0, 400, 301], "is not inside"),
        ([0, 0, 79, 300], "is less than 20% of a side"),
    ],
)
def test_a_box_that_does_not_fit_its_image_is_an_unusable_file(
    folder: Path, box: list[int], reason: str
) -> None:
    [dataset], _ = read(folder, crop_boxes={"a.png": box})
    with pytest.raises(UnusableFile, match=reason):
        assign_crops(
            dataset.resize_crop, (400, 300), "a", 1, 16, dataset.choices.box_by_path()["a.png"]
        )
    with pytest.raises(DataError, match="1 of 3 images cannot be used"):
        scan_datasets([dataset], OPTIONS, 1, lambda event: None)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"exclude": [["a.png"]]}, "photos.exclude"),
        ({"exclude": [""]}, "photos.exclude"),
        ({"crop_boxes": ["a.png"]}, "photos.crop_boxes"),
        ({"crop_boxes": {"a.png": [0, 0, 9]}}, "'a.png': [0, 0, 9] is not a box; write [left, top"),
        ({"crop_boxes": {"a.png": [0, 0, 9.5, 9]}}, "is not a box"),
        ({"crop_boxes": {"a.png": [0, 0, True, 9]}}, "is not a box"),
        ({"crop_boxes": {"a.png": [0, -1, 9, 9]}}, "is not a box"),
        ({"crop_boxes": {"a.png": [0, 0, 0, 9]}}, "is not a box"),
        ({"crop_boxes": {"a.png": [0, 0, 2**40, 9]}}, "is not a box"),
        ({"crop_boxes": {"a.png": "0,0,9,9"}}, "is not a box"),
    ],
)
def test_what_is_neither_a_list_of_paths_nor_boxes_is_one_problem(
    folder: Path, fields: dict[str, Any], problem: str
) -> None:
    _, problems = read(folder, **fields)
    assert len(problems) == 1
    assert problem in problems[0]
