"""The zorbo, a friendly robot that chroma-nano has never seen: what the example teaches, and how it is found.

A zorbo of every size and place is laid over the picture; it is there if at one of them the light of both
eyes, both dark pupils, the lamp and the head's one colour are all where the example's pictures have them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from simpletuner.validation.shapes.read import ground_of, nearest, position_of
from simpletuner.validation.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SIDE_PX,
    Point,
    Rgb,
    Scene,
    caption,
    generator,
    single_thing,
)

SEED = 41
NAME = "zorbo"
RADIUS = 0.275  # share of the side
DARK, LIGHT, LAMP = (28, 28, 36), (250, 250, 250), (255, 225, 60)

RADII = np.arange(0.20, 0.345, 0.0125)  # shares of the side
STEP_PX = 2.0  # between two places
NEAR = 95.0  # RGB distance within which a part has its colour; light and dark are 380 apart
HEAD_APART = 45.0  # least distance of the head's colour from the ground
ONE_COLOUR = 50.0  # mean distance of the head's points from their median


@dataclass(frozen=True)
class Zorbo:
    """What a picture that has one shows besides it."""

    background: str
    colour: str
    position: str


def _ring(centre: Point, radius: float, count: int) -> list[Point]:
    turns = [2 * math.pi * i / count for i in range(count)]
    return [(centre[0] + radius * math.cos(t), centre[1] + radius * math.sin(t)) for t in turns]


EYES, PUPILS = ((-0.42, 0.05), (0.42, 0.05)), ((-0.42, 0.08), (0.42, 0.08))
LAMP_AT = (0.0, -0.95)
# places in units of the radius, y downwards; those of an eye lie between pupil and rim
PARTS: tuple[tuple[Rgb, list[Point]], ...] = (
    *((LIGHT, _ring(eye, 0.235, 8)) for eye in EYES),
    *((DARK, [pupil, *_ring(pupil, 0.06, 4)]) for pupil in PUPILS),
    (LAMP, [LAMP_AT, *_ring(LAMP_AT, 0.1, 6)]),
)
HEAD = [
    *((x, -0.38) for x in (-0.65, -0.3, 0.0, 0.3, 0.65)),
    *((x, y) for x in (-0.8, 0.8) for y in (-0.1, 0.25, 0.6)), (0.0, 0.0), (0.0, 0.3),
]  # fmt: skip


def compose_lesson(number: int) -> Scene:
    """Scene `number`; every colour, place and background comes round before it is used again."""
    rng = generator(SEED, "lesson", number)
    background = list(BACKGROUNDS)[(3 * number + number // 10) % len(BACKGROUNDS)]
    position = list(POSITIONS)[number % len(POSITIONS)]
    drawn = single_thing(rng, background, position)
    thing = replace(drawn, shape=NAME, size="big", pattern="plain", radius=RADIUS)
    return Scene(background, BACKGROUNDS[background], (thing,), caption(rng, background, (thing,)))


def find(picture: Image.Image) -> Zorbo | None:
    """The zorbo of an RGB picture of SIDE_PX, or None."""
    if picture.size != (SIDE_PX, SIDE_PX):
        raise ValueError(f"a picture of {SIDE_PX} x {SIDE_PX} px is read, not one of {picture.size}")
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = ground_of(pixels)
    places = (place for radius in RADII for place in _best_place(pixels, ground, float(radius)))
    best = min(places, key=lambda place: place[0], default=None)
    if best is None:
        return None
    return Zorbo(nearest(ground, BACKGROUNDS), nearest(best[2], COLOURS), position_of(best[1]))


def _best_place(
    pixels: np.ndarray, ground: np.ndarray, radius: float
) -> list[tuple[float, Point, np.ndarray]]:
    """Misfit of the worst part, middle and head colour at the best place; nothing where a part is missing.

    Misfits are in units of what is allowed, so that all parts are there below 1.
    """
    side = len(pixels)
    ticks = np.arange(radius * side * 0.7, side - radius * side * 0.7, STEP_PX)
    middles = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 1, 2)
    worst = np.zeros(len(middles))
    for colour, places in PARTS:
        found = _sampled(pixels, middles, radius, places)
        misfit = np.linalg.norm(found - np.array(colour), axis=2).mean(axis=1) / NEAR
        worst = np.maximum(worst, misfit)
        middles, worst = middles[worst < 1], worst[worst < 1]
    if len(middles) == 0:
        return []
    found = _sampled(pixels, middles, radius, HEAD)
    body = np.median(found, axis=1)
    uneven = np.linalg.norm(found - body[:, None], axis=2).mean(axis=1) / ONE_COLOUR
    unseen = HEAD_APART / np.maximum(np.linalg.norm(body - ground, axis=1), 1e-6)
    worst = np.max([worst, uneven, unseen], axis=0)
    best = int(np.argmin(worst))
    if worst[best] >= 1:
        return []
    x, y = (float(value) / side for value in middles[best, 0])
    return [(float(worst[best]), (x, y), body[best])]


def _sampled(pixels: np.ndarray, middles: np.ndarray, radius: float, places: list[Point]) -> np.ndarray:
    """(middles, places, 3) colours; middles in px, places in units of the radius."""
    spots = np.rint(middles + radius * len(pixels) * np.array(places)).clip(0, len(pixels) - 1).astype(int)
    return pixels[spots[..., 1], spots[..., 0]]
