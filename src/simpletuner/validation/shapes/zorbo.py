"""The zorbo, shaped like an hourglass, which chroma-nano has never seen: what the example teaches."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from simpletuner.validation.shapes.detection import DetectedScene, detect_scene
from simpletuner.validation.shapes.scenes import (
    BACKGROUNDS,
    OUTLINES,
    POSITIONS,
    ZORBO,
    Scene,
    compose_caption,
    random_generator,
    random_object,
)

ZORBO_SEED = 41
ZORBO_RADIUS = 0.275  # share of the side


def compose_zorbo_scene(number: int) -> Scene:
    """Scene `number`; every colour, place and background comes round before it is used again."""
    rng = random_generator(ZORBO_SEED, "lesson", number)
    background = list(BACKGROUNDS)[(3 * number + number // 10) % len(BACKGROUNDS)]
    position = list(POSITIONS)[number % len(POSITIONS)]
    drawn = random_object(rng, background, position)
    zorbo = replace(drawn, shape=ZORBO, size="big", pattern="plain", radius=ZORBO_RADIUS)
    return Scene(
        background, BACKGROUNDS[background], (zorbo,), compose_caption(rng, background, (zorbo,))
    )


def detect_zorbo(picture: Image.Image) -> DetectedScene | None:
    """What an RGB picture of SIDE_PX shows if its largest object is a zorbo; read as the shapes are."""
    reading = detect_scene(picture, tuple(OUTLINES))
    return reading if reading.objects and reading.objects[0].shape == ZORBO else None
