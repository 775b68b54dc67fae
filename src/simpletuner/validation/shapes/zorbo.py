"""The zorbo, an hourglass that chroma-nano was never trained on: the concept of the example."""

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
ZORBO_RADIUS = 0.275  # as a fraction of the image side


def compose_zorbo_scene(number: int) -> Scene:
    """Return scene `number`; every background and position is used before one is repeated."""
    rng = random_generator(ZORBO_SEED, "lesson", number)
    background = list(BACKGROUNDS)[(3 * number + number // 10) % len(BACKGROUNDS)]
    position = list(POSITIONS)[number % len(POSITIONS)]
    base_object = random_object(rng, background, position)
    zorbo = replace(base_object, shape=ZORBO, size="big", pattern="plain", radius=ZORBO_RADIUS)
    return Scene(
        background, BACKGROUNDS[background], (zorbo,), compose_caption(rng, background, (zorbo,))
    )


def detect_zorbo(image: Image.Image) -> DetectedScene | None:
    """Return what an RGB image of SIDE_PX shows if its largest object is a zorbo, else None."""
    scene = detect_scene(image, tuple(OUTLINES))
    return scene if scene.objects and scene.objects[0].shape == ZORBO else None
