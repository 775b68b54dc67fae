from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from simpletuner.config.discovery import example_folder
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.near_duplicates import (
    MAX_HASH_DISTANCE,
    ImageFingerprint,
    fingerprint_image,
    fingerprint_samples,
    group_near_duplicates,
    looks_the_same,
)
from simpletuner.data.scan import scan_datasets


def photograph(seed: int, side: int = 160) -> Image.Image:
    """Noise whose amplitude falls as 1 / frequency in each channel, like that of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    shape = (3, side, side // 2 + 1)
    spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / frequency
    # Half of what the channels show is common to them, as in photographs.
    waves = np.fft.irfft2(spectrum, (side, side))
    waves = waves + waves.mean(axis=0, keepdims=True)
    levels = 128 + 50 * (waves - waves.mean()) / waves.std()
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def saved_again(image: Image.Image, folder: Path, quality: int = 60) -> Image.Image:
    path = folder / "copy.jpg"
    image.save(path, quality=quality)
    return Image.open(path).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image, Path], Image.Image]] = {
    "saved again": saved_again,
    "half the size": lambda image, folder: image.resize((80, 80)),
    "other aspect": lambda image, folder: image.resize((200, 160)),
    "brighter": lambda image, folder: ImageEnhance.Brightness(image).enhance(1.08),
    "darker and smaller": lambda image, folder: ImageEnhance.Brightness(
        image.resize((120, 120))
    ).enhance(0.93),
    "cropped at each edge": lambda image, folder: image.crop((2, 2, 158, 158)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_found_and_other_images_are_not(change: str, tmp_path: Path) -> None:
    images = [photograph(seed) for seed in range(10)]
    copies = [CHANGES[change](image, tmp_path) for image in images]
    prints = [fingerprint_image(image) for image in (*images, *copies)]
    groups = group_near_duplicates(prints)
    assert groups == [[position, position + 10] for position in range(10)]


def test_drawn_scenes_are_told_apart_although_they_share_background_and_shape() -> None:
    folder = example_folder("chroma-nano.peft-lora")
    paths = sorted((folder / "zorbo").glob("*.png")) + sorted((folder / "shapes").glob("*.png"))
    assert len(paths) > 40
    prints = [fingerprint_image(Image.open(path).convert("RGB")) for path in paths]
    assert group_near_duplicates(prints) == []


def test_plain_images_match_only_in_their_colour() -> None:
    colours = ["red", "white", "black", "#fefefe", "blue"]
    prints = [fingerprint_image(Image.new("RGB", (40, 40), colour)) for colour in colours]
    assert len({item.hash for item in prints}) == 1
    assert group_near_duplicates(prints) == [[1, 3]]


def test_small_copies_may_differ_by_noise_and_brightness_up_to_a_limit() -> None:
    levels = np.random.default_rng(0).integers(60, 190, (256, 3))
    noise = np.random.default_rng(1).normal(size=(256, 3))

    def changed(by: np.ndarray | float) -> ImageFingerprint:
        return ImageFingerprint(0, np.rint(levels + by).astype(np.uint8).tobytes())

    assert looks_the_same(changed(0), changed(7 * noise))
    assert not looks_the_same(changed(0), changed(10 * noise))
    assert looks_the_same(changed(0), changed(18.0))
    assert not looks_the_same(changed(0), changed(22.0))


def test_hashes_within_the_distance_are_candidates() -> None:
    thumbnail = bytes(16 * 16 * 3)
    rng = np.random.default_rng(0)
    for _ in range(200):
        number = int(rng.integers(0, 2**63))
        flips = rng.choice(64, MAX_HASH_DISTANCE + 1, replace=False).tolist()
        near, far = number, number
        for bit in flips[:-1]:
            near ^= 1 << bit
        for bit in flips:
            far ^= 1 << bit
        one, other, distant = (ImageFingerprint(x, thumbnail) for x in (number, near, far))
        assert group_near_duplicates([one, other]) == [[0, 1]]
        assert group_near_duplicates([one, distant]) == []


def test_a_group_looks_like_its_first_image_and_none_matches_nothing() -> None:
    image = photograph(1)
    steps = [
        fingerprint_image(ImageEnhance.Brightness(image).enhance(1 + 0.06 * step))
        for step in range(5)
    ]
    assert not looks_the_same(steps[0], steps[4])
    groups = group_near_duplicates([None, *steps, None])
    assert groups
    assert not {0, 6} & set().union(*groups)
    for group in groups:
        assert all(looks_the_same(steps[group[0] - 1], steps[other - 1]) for other in group)


def test_comparisons_grow_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def count(one: ImageFingerprint, other: ImageFingerprint) -> bool:
        nonlocal compared
        compared += 1
        return looks_the_same(one, other)

    monkeypatch.setattr("simpletuner.data.near_duplicates.looks_the_same", count)
    monkeypatch.setattr("simpletuner.data.near_duplicates.MAX_CANDIDATES", 8)
    rng = np.random.default_rng(0)
    numbers = [int(value) for value in rng.integers(0, 2**63, 1000)]
    group_near_duplicates([ImageFingerprint(value, bytes(768)) for value in numbers])
    assert compared < 30
    # One hash for all of them, and no two alike: the worst case.
    colours = rng.integers(0, 256, (200, 3), np.uint8)
    group_near_duplicates([ImageFingerprint(0, bytes(colour) * 256) for colour in colours])
    assert 200 < compared <= 200 * 8 + 30


def test_samples_are_decoded_upright_and_damaged_ones_are_none(
    tmp_path: Path, options: DataOptions, dataset: Callable[..., DatasetConfig]
) -> None:
    photos = dataset()
    folder = photos.instance_data_dir
    image = photograph(3, 300)
    image.save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "b.jpg", exif=exif, quality=90)
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:20000])
    for name in "abc":
        (folder / f"{name}.txt").write_text("a photograph")
    scanned = scan_datasets([photos], options, 0, lambda event: None)
    advanced: list[int] = []
    prints = fingerprint_samples(
        [item.sample for item in scanned.samples], options, advanced.append
    )
    assert prints[2] is None
    assert advanced == [1, 1, 1]
    assert group_near_duplicates(prints) == [[0, 1]]
