"""The zorbo, shaped like an hourglass, which chroma-nano has never seen: what the example teaches."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from simpletuner.validation.shapes.read import Reading, read
from simpletuner.validation.shapes.world import (
    BACKGROUNDS,
    OUTLINES,
    POSITIONS,
    ZORBO,
    Scene,
    caption,
    generator,
    thing_at,
)

SEED = 41
RADIUS = 0.275  # share of the side


def compose_lesson(number: int) -> Scene:
    """Scene `number`; every colour, place and background comes round before it is used again."""
    rng = generator(SEED, "lesson", number)
    background = list(BACKGROUNDS)[(3 * number + number // 10) % len(BACKGROUNDS)]
    position = list(POSITIONS)[number % len(POSITIONS)]
    drawn = thing_at(rng, background, position)
    zorbo = replace(drawn, shape=ZORBO, size="big", pattern="plain", radius=RADIUS)
    return Scene(background, BACKGROUNDS[background], (zorbo,), caption(rng, background, (zorbo,)))


def find(picture: Image.Image) -> Reading | None:
    """What an RGB picture of SIDE_PX shows if its largest object is a zorbo; read as the shapes are."""
    reading = read(picture, tuple(OUTLINES))
    return reading if reading.things and reading.things[0].shape == ZORBO else None
