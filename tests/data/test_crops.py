"""Several crops of an image: their places and shapes, and the sizes that they may have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.config.schema import DataOptions
from simpletuner.data.crop_assignment import assign_bucket, assign_crops
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ResizeCropConfig, bucket_sizes
from simpletuner.data.pixels import load_pixels
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.scan import scan_datasets

RANDOM = ResizeCropConfig(resolution=128, crop=True, crop_style="random", crop_aspect="square")
SHAPES = ResizeCropConfig(
    resolution=128, crop=True, crop_aspect="random", crop_aspect_buckets=(0.5, 1.0, 2.0)
)


def replace(config: ResizeCropConfig, **fields: object) -> ResizeCropConfig:
    return ResizeCropConfig(**{**vars(config), **fields})


def test_the_first_crop_is_the_only_one_of_a_single_crop() -> None:
    one = assign_crops(RANDOM, (900, 300), "a/x", 1, 64)
    many = assign_crops(replace(RANDOM, crops_per_image=8), (900, 300), "a/x", 1, 64)
    assert many[:1] == one == [assign_bucket(RANDOM, (900, 300), "a/x", 1, 64)]
    places = {corner for _, corner, _ in many}
    assert len(places) > 5
    assert all(0 <= left <= 384 - 128 and top == 0 for left, top in places)
    assert {bucket for _, _, bucket in many} == {(128, 128)}
    assert many != assign_crops(replace(RANDOM, crops_per_image=8), (900, 300), "a/x", 2, 64)


def test_a_random_shape_is_one_per_image_and_each_crop_has_the_next() -> None:
    shapes = [(64, 192), (128, 128), (192, 64)]
    assert set(bucket_sizes(SHAPES, (500, 500), 64)) == set(shapes)
    first = [assign_bucket(SHAPES, (500, 500), f"a/{number}", 1, 64)[2] for number in range(300)]
    assert all(75 < first.count(shape) < 125 for shape in shapes)
    several = assign_crops(replace(SHAPES, crops_per_image=4), (500, 500), "a/0", 1, 64)
    found = [bucket for _, _, bucket in several]
    assert found[0] == first[0] == found[3]
    assert set(found) == set(shapes)


def test_a_random_shape_does_not_enlarge_more_than_allowed() -> None:
    limited = replace(SHAPES, max_upscale_threshold=0.2, crops_per_image=6)
    assert {bucket for _, _, bucket in assign_crops(limited, (110, 200), "a/x", 1, 64)} == {
        (64, 192),
        (128, 128),
    }
    with pytest.raises(UnusableFile, match="would be enlarged by"):
        assign_crops(limited, (40, 40), "a/x", 1, 64)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1000, 1000), (256, 256)),
        ((200, 200), (128, 128)),
        ((100, 100), (128, 128)),
        ((1000, 600), (192, 128)),
        ((600, 1000), (128, 192)),
        ((4000, 1000), (192, 128)),
    ],
)
def test_the_closest_of_own_buckets(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Nearest in ratio; of equal ones the largest that does not enlarge, else the smallest."""
    listed = ((256, 256), (128, 128), (192, 128), (128, 192))
    own = replace(RANDOM, crop_aspect="closest", resolution_buckets=listed)
    assert bucket_sizes(own, size, 64) == (expected,)
    assert bucket_sizes(replace(own, crop_aspect="random"), size, 64) == listed
    assert bucket_sizes(replace(own, crop=False), (600, 600), 64) == ((128, 128),)


def test_a_scan_gives_every_crop_and_counts_images(
    tmp_path: Path, dataset: Callable[..., DatasetConfig]
) -> None:
    photos = dataset(
        resize_crop=replace(RANDOM, resolution=64, crops_per_image=3), max_num_samples=4
    )
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 300, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")
        (tmp_path / f"photos/{number}.txt").write_text("a")
    seen: list[object] = []
    options = DataOptions()
    samples = scan_datasets([photos], options, 1, seen.append).samples
    assert [item.crop_index for item in samples] == [0, 1, 2] * 4
    assert len({item.sample.id for item in samples}) == 4
    assert any("4 kept" in str(event) for event in seen)
    pixels = [load_pixels(item, options) for item in samples[:3]]
    assert len({part.tobytes() for part in pixels}) == 3
