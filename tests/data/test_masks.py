"""Which file is the mask of an image, and what it is on the grid of the latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.data.masks import load_mask
from simpletuner.data.pixels import load_pixels
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sample_types import BucketedSample, Sample, SampleMask
from simpletuner.data.scan import ScanResult, scan_datasets
from simpletuner.data.sources import LocalFile
from simpletuner.errors import DataError
from simpletuner.events.event_types import Event, NoticeIssued
from tests.data.test_tar_source import write_tar

MakeDataset = Callable[..., DatasetConfig]
OPTIONS = DataOptions(resolution=128, missing_caption="empty", max_bad_sample_fraction=1.0)
STRIDE = 8


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(pixels).save(path, **options)


def grey(width: int = 128, height: int = 128, level: int = 255) -> np.ndarray:
    return np.full((height, width), level, np.uint8)


def picture(width: int = 128, height: int = 128) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)


def scan(*datasets: DatasetConfig) -> tuple[ScanResult, list[str]]:
    seen: list[Event] = []
    found = scan_datasets(datasets, OPTIONS, 1, seen.append)
    return found, [event.message for event in seen if isinstance(event, NoticeIssued)]


def masks_by_name(found: ScanResult) -> dict[str, str | None]:
    def describe(mask: SampleMask | None) -> str | None:
        return None if mask is None else mask.file.name if mask.file else mask.channel

    return {item.sample.id: describe(item.sample.mask) for item in found.samples}


def placed(image: Path, mask: SampleMask, **changes: object) -> BucketedSample:
    with Image.open(image) as opened:
        size = opened.size
    sample = Sample("d/x", "d", LocalFile(image), *size, ("c",), mask=mask)
    return replace(BucketedSample(sample, size, (0, 0), size), **changes)


def test_a_mask_beside_an_image_is_no_image(dataset: MakeDataset, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    save(photos / "a.png", picture())
    save(photos / "a.MASK.jpg", grey())
    save(photos / "b.jpg", picture())
    save(photos / "none.mask.png", grey())
    found, notices = scan(dataset())
    assert masks_by_name(found) == {"photos/a.png": "a.MASK.jpg", "photos/b.jpg": None}
    assert "photos: masks for 1 of 2 images" in notices
    assert any("1 mask without an image" in notice for notice in notices)


def test_masks_of_a_dataset_match_by_stem(dataset: MakeDataset, tmp_path: Path) -> None:
    for name in ("cats/a", "dogs/a", "b", "c"):
        save(tmp_path / "photos" / f"{name}.png", picture())
    for name in ("cats/a.jpg", "dogs/a.webp", "elsewhere/b.mask.png", "x/unused.png"):
        save(tmp_path / "masks" / name, grey())
    save(tmp_path / "photos" / "b.mask.png", grey())
    masks = DatasetConfig("masks", "conditioning", tmp_path / "masks")
    found, notices = scan(dataset(masks=masks))
    assert masks_by_name(found) == {
        "photos/b.png": "b.mask.png",
        "photos/cats/a.png": "a.jpg",
        "photos/dogs/a.png": "a.webp",
    }
    (b,) = (item for item in found.samples if item.sample.file.stem == "b")
    assert b.sample.mask is not None
    assert b.sample.mask.file == LocalFile(tmp_path / "masks" / "elsewhere" / "b.mask.png")
    (missing,) = found.rejected
    assert (missing.path, missing.reason) == ("c.png", "mask_missing")
    assert "masks: 1 mask without an image" in notices


def test_images_without_their_masks_stop_the_run(dataset: MakeDataset, tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png", picture())
    (tmp_path / "masks").mkdir()
    masks = DatasetConfig("masks", "conditioning", tmp_path / "masks")
    with pytest.raises(DataError, match="masks: no masks in"):
        scan(dataset(masks=masks))
    save(tmp_path / "masks" / "other.png", grey())
    strict = OPTIONS.model_copy(update={"max_bad_sample_fraction": 0.1})
    with pytest.raises(DataError, match="masks has no mask named a"):
        scan_datasets([dataset(masks=masks)], strict, 1, lambda event: None)


def test_masks_in_tar_files(tmp_path: Path) -> None:
    for name, pixels in {"a.png": picture(), "a.mask.png": grey(), "b.png": picture()}.items():
        save(tmp_path / name, pixels)
    files = {name: (tmp_path / name).read_bytes() for name in ("a.png", "a.mask.png", "b.png")}
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", files)
    shards = DatasetConfig(
        "t", "image", tmp_path / "tars", ResizeCropConfig(128.0), type="webdataset"
    )
    assert masks_by_name(scan(shards)[0]) == {"t/0.tar/a.png": "a.mask.png", "t/0.tar/b.png": None}


def test_a_held_out_image_has_no_mask(dataset: MakeDataset, tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png", picture())
    save(tmp_path / "photos" / "a.mask.png", grey())
    held_out = dataset("held", dataset_type="eval")
    assert masks_by_name(scan(held_out)[0]) == {"held/a.png": None}


def test_alpha_is_a_mask_by_option(dataset: MakeDataset, tmp_path: Path) -> None:
    pixels = np.dstack([picture(), grey(level=0)])
    pixels[:, :64, 3] = 255
    save(tmp_path / "photos" / "a.png", pixels)
    save(tmp_path / "photos" / "b.png", picture())
    assert masks_by_name(scan(dataset())[0]) == {"photos/a.png": None, "photos/b.png": None}
    found, notices = scan(dataset(alpha_mask=True))
    assert masks_by_name(found) == {"photos/a.png": "alpha", "photos/b.png": None}
    assert "photos: masks for 1 of 2 images" in notices
    levels = load_mask(found.samples[0], STRIDE)
    assert np.array_equal(levels, np.repeat([[1.0] * 8 + [0.0] * 8], 16, axis=0))


def test_a_mask_of_another_shape_is_rejected(dataset: MakeDataset, tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png", picture())
    save(tmp_path / "photos" / "a.mask.png", grey(128, 64))
    save(tmp_path / "photos" / "b.png", picture())
    save(tmp_path / "photos" / "b.mask.png", grey(64, 64))
    save(tmp_path / "photos" / "c.png", picture())
    (tmp_path / "photos" / "c.mask.png").write_bytes(b"nothing")
    found, _ = scan(dataset())
    assert masks_by_name(found) == {"photos/b.png": "b.mask.png"}, "half its size is fine"
    reasons = {item.path: (item.reason, item.detail) for item in found.rejected}
    assert reasons["a.png"][0] == "mask_size"
    assert "a.mask.png is 128x64 px and the image is 128x128" in reasons["a.png"][1]
    assert reasons["c.png"][0] == "mask_unreadable"


@pytest.mark.parametrize("style", ["center", "random", "corner"])
def test_a_mask_is_cropped_exactly_as_its_image(
    style: str, dataset: MakeDataset, tmp_path: Path
) -> None:
    """An image that is its own mask gives the means of its own pixels."""
    stripes = (np.add.outer(np.arange(300) // 16, np.arange(128) // 16) % 2 * 255).astype(np.uint8)
    save(tmp_path / "photos" / "a.png", stripes)
    save(tmp_path / "photos" / "a.mask.png", stripes)
    crop = ResizeCropConfig(128, crop=True, crop_style=style)
    found, _ = scan(dataset(resize_crop=crop))
    (item,) = found.samples
    assert item.bucket_px == (128, 128)
    pixels = load_pixels(item, OPTIONS)[..., 0].astype(np.float64) / 255
    expected = pixels.reshape(16, 8, 16, 8).mean((1, 3))
    assert np.allclose(load_mask(item, STRIDE), expected, atol=1e-6)


def test_cells_have_the_mean_of_their_area(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (48, 64)).astype(np.uint8)
    save(tmp_path / "a.png", pixels)
    mask = SampleMask(LocalFile(tmp_path / "a.png"), "luminance")
    levels = load_mask(placed(tmp_path / "a.png", mask), STRIDE)
    assert levels.shape == (6, 8)
    assert levels.dtype == np.float32
    assert levels[2, 3] == np.float32(pixels[16:24, 24:32].astype(np.float64).mean() / 255)
    white = tmp_path / "white.png"
    save(white, grey(301, 301))
    whole = placed(
        white, SampleMask(LocalFile(white), "luminance"), resize_px=(64, 64), bucket_px=(64, 64)
    )
    assert (load_mask(whole, STRIDE) == 1).all()


def test_kinds_of_pixels_in_masks(tmp_path: Path) -> None:
    """16 bits, colours by luminance, transparency as black, and EXIF's orientation."""
    image = tmp_path / "image.png"
    save(image, picture(64, 64))

    def levels(name: str, pixels: np.ndarray, **options: object) -> np.ndarray:
        save(tmp_path / name, pixels, **options)
        mask = SampleMask(LocalFile(tmp_path / name), "luminance")
        return load_mask(placed(image, mask), STRIDE)

    assert np.allclose(levels("16.png", np.full((64, 64), 32896, np.uint16)), 128 / 255)
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 255
    assert np.allclose(levels("red.png", red), 76 / 255)
    clear = np.full((64, 64, 4), 255, np.uint8)
    clear[:32, :, 3] = 0
    assert np.array_equal(levels("clear.png", clear)[:, 0], [0.0] * 4 + [1.0] * 4)
    half = grey(64, 64)
    half[:32] = 0
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = levels("turned.png", half, exif=exif)
    assert np.array_equal(turned[:, 0], [1.0] * 4 + [0.0] * 4)


def test_a_mask_that_is_black_or_damaged_cannot_be_used(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    save(image, picture(64, 64))
    save(tmp_path / "black.png", grey(64, 64, 0))
    with pytest.raises(UnusableFile, match="black where the image is cropped"):
        load_mask(placed(image, SampleMask(LocalFile(tmp_path / "black.png"), "luminance")), STRIDE)
    cut = image.read_bytes()[:200]
    (tmp_path / "cut.png").write_bytes(cut)
    with pytest.raises(UnusableFile, match="its mask: "):
        load_mask(placed(image, SampleMask(LocalFile(tmp_path / "cut.png"), "luminance")), STRIDE)
