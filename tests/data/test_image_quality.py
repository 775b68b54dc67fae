from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from simpletuner.config.discovery import example_folder
from simpletuner.data.image_quality import measure_sharpness
from simpletuner.data.statistics import BLUR_LIMIT_PX
from tests.data.test_near_duplicates import photograph


def drawing(seed: int, side: int = 384, shapes: int = 30) -> Image.Image:
    """Plain shapes, drawn at four times the size and reduced, so that edges are like a camera's."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (4 * side, 4 * side), "#d8d0c0")
    draw = ImageDraw.Draw(image)
    for _ in range(shapes):
        left, top = rng.integers(0, 3 * side, 2).tolist()
        width, height = rng.integers(side // 4, side, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((left, top, left + width, top + height), fill=colour)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def blur(image: Image.Image) -> float:
    found = measure_sharpness(image).blur_px
    assert found is not None
    return found


@pytest.mark.parametrize("radius_px", [1.0, 2.0, 3.0, 5.0, 8.0])
def test_a_known_blur_is_measured(radius_px: float) -> None:
    blurred = drawing(0, shapes=60).filter(ImageFilter.GaussianBlur(radius_px))
    assert blur(blurred) == pytest.approx(radius_px, rel=0.35)


def test_the_limit_separates_sharp_from_blurred_whatever_the_subject() -> None:
    crowded, sparse = drawing(0, 256, 120), drawing(1, 256, 2)
    ratio = (
        measure_sharpness(crowded).laplacian_variance / measure_sharpness(sparse).laplacian_variance
    )
    assert ratio > 3  # which is why this number alone decides nothing
    for image in (crowded, sparse):
        assert blur(image) < BLUR_LIMIT_PX / 2
        assert blur(image.filter(ImageFilter.GaussianBlur(3))) > BLUR_LIMIT_PX
        low_contrast = image.point(lambda level: 110 + level // 8)
        assert blur(low_contrast) < BLUR_LIMIT_PX / 2


def test_a_sharp_subject_before_a_soft_background_is_sharp() -> None:
    image = drawing(2).filter(ImageFilter.GaussianBlur(6))
    assert blur(image) > BLUR_LIMIT_PX
    image.paste(drawing(3, 96, 6), (140, 140))
    assert blur(image) < BLUR_LIMIT_PX / 2


def test_the_bundled_images_and_noise_are_sharp() -> None:
    for path in sorted(example_folder("chroma-nano.peft-lora").glob("*/*.png")):
        assert blur(Image.open(path).convert("RGB")) < BLUR_LIMIT_PX, path
    assert blur(photograph(0)) < BLUR_LIMIT_PX / 2


def test_an_image_of_one_colour_has_no_edges() -> None:
    assert measure_sharpness(Image.new("RGB", (64, 64), "teal")).blur_px is None
    assert measure_sharpness(Image.new("L", (3, 3))).blur_px is None
