"""The scenes and captions of chroma-nano; each is a pure function of (seed, number)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from simpletuner.randomness import seed_at

Rgb = tuple[int, int, int]
Point = tuple[float, float]

SIDE_PX = 128
SUPERSAMPLING = 3

COLOURS: dict[str, Rgb] = {
    "red": (215, 35, 40),
    "orange": (245, 130, 25),
    "yellow": (250, 215, 45),
    "green": (45, 160, 65),
    "blue": (40, 90, 215),
    "purple": (130, 55, 170),
    "pink": (245, 115, 175),
    "brown": (125, 75, 40),
    "black": (20, 20, 22),
    "white": (252, 252, 252),
}
BACKGROUNDS: dict[str, Rgb] = {
    "light grey": (200, 200, 202),
    "dark grey": (75, 76, 80),
    "cream": (250, 236, 200),
    "sky blue": (150, 200, 240),
    "mint": (175, 235, 205),
    "lavender": (200, 185, 240),
    "peach": (250, 200, 165),
    "navy": (22, 30, 85),
    "teal": (15, 105, 110),
    "olive": (112, 112, 45),
}
SIZES = {"big": 0.285, "small": 0.155}  # radius as a fraction of the image side
PAIR_RADIUS = 0.19
POSITIONS: dict[str, Point] = {
    "centre": (0.5, 0.5),
    "left": (0.315, 0.5),
    "right": (0.685, 0.5),
    "top": (0.5, 0.315),
    "bottom": (0.5, 0.685),
}
PAIRS = (("left", "right"), ("top", "bottom"))
PAIR_SPREAD = 1.32  # the objects of a pair are farther from the centre by this factor
POSITION_PHRASES = {
    "centre": ("in the centre", "in the middle"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
PATTERNS = ("plain", "striped", "dotted")
MIN_CONTRAST = 95.0  # smallest RGB distance between an object and the background


@dataclass(frozen=True)
class SceneObject:
    """One object. radius, centre: fractions of the image side. angle: radians from upright."""

    shape: str
    colour: str
    size: str
    position: str
    pattern: str
    rgb: Rgb
    radius: float
    centre: Point
    angle: float


@dataclass(frozen=True)
class Scene:
    """The content of one image, and its caption."""

    background: str
    background_rgb: Rgb
    objects: tuple[SceneObject, ...]
    caption: str


def random_generator(seed: int, purpose: str, *address: int | str) -> np.random.Generator:
    """Return a new generator for one address; see randomness.seed_at."""
    return np.random.Generator(np.random.Philox(seed_at(seed, purpose, *address)))


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    """Return one of the choices, each with the same probability."""
    return choices[int(rng.integers(len(choices)))]


def circle_outline(radius: float = 1.0, centre: Point = (0.0, 0.0)) -> list[Point]:
    """Return a polygon of 72 corners."""
    turns = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    return [(centre[0] + radius * math.cos(t), centre[1] + radius * math.sin(t)) for t in turns]


def star_outline() -> list[Point]:
    """Return ten corners, every second one nearer to the centre."""
    turns = [(0.42 if i % 2 else 1.0, -math.pi / 2 + 2 * math.pi * i / 10) for i in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in turns]


def heart_outline() -> list[Point]:
    """Return the heart curve as a polygon of 90 corners, scaled to radius 1."""
    turns = np.linspace(0, 2 * math.pi, 90, endpoint=False)
    x = 16 * np.sin(turns) ** 3
    y = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns))
    return [(float(a) / 17, float(b + 2.5) / 17) for a, b in zip(x, y)]


CROSS_ARM = 0.34  # half of the width of an arm of the cross
# Name -> (filled outline, outline that is cut out of it), in units of the radius; y points down.
SHAPES: dict[str, tuple[list[Point], list[Point] | None]] = {
    "circle": (circle_outline(), None),
    "square": ([(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)], None),
    "triangle": ([(0, -0.95), (1.0, 0.8), (-1.0, 0.8)], None),
    "star": (star_outline(), None),
    "heart": (heart_outline(), None),
    "cross": (
        [
            (-CROSS_ARM, -1),
            (CROSS_ARM, -1),
            (CROSS_ARM, -CROSS_ARM),
            (1, -CROSS_ARM),
            (1, CROSS_ARM),
            (CROSS_ARM, CROSS_ARM),
            (CROSS_ARM, 1),
            (-CROSS_ARM, 1),
            (-CROSS_ARM, CROSS_ARM),
            (-1, CROSS_ARM),
            (-1, -CROSS_ARM),
            (-CROSS_ARM, -CROSS_ARM),
        ],
        None,
    ),
    "ring": (circle_outline(), circle_outline(0.55)),
    "diamond": ([(0, -1.08), (0.72, 0), (0, 1.08), (-0.72, 0)], None),
    "crescent": (circle_outline(), circle_outline(0.85, (0.48, -0.1))),
}
ZORBO = "zorbo"  # an hourglass, the concept of the example; no image of the base has it
HOURGLASS = [(-0.85, -0.95), (0.85, -0.95), (0.2, 0), (0.85, 0.95), (-0.85, 0.95), (-0.2, 0)]
OUTLINES: dict[str, tuple[list[Point], list[Point] | None]] = {**SHAPES, ZORBO: (HOURGLASS, None)}


def compose_scene(seed: int, number: int) -> Scene:
    """Return scene `number` of a seed, a pure function of the two."""
    rng = random_generator(seed, "scene", number)
    background = pick(rng, list(BACKGROUNDS))
    objects: tuple[SceneObject, ...]
    if rng.random() < 0.3:
        first, second = PAIRS[int(rng.integers(len(PAIRS)))]
        objects = (
            random_object(rng, background, first, pair=True),
            random_object(rng, background, second, pair=True),
        )
    else:
        objects = (random_object(rng, background, pick(rng, list(POSITIONS))),)
    background_rgb = _jitter(rng, BACKGROUNDS[background], 3)
    return Scene(background, background_rgb, objects, compose_caption(rng, background, objects))


@cache
def visible_colours(background: str) -> tuple[str, ...]:
    """Return the colours with enough contrast to the background."""
    background_rgb = BACKGROUNDS[background]
    return tuple(
        name for name, rgb in COLOURS.items() if math.dist(background_rgb, rgb) >= MIN_CONTRAST
    )


def random_object(
    rng: np.random.Generator, background: str, position: str, pair: bool = False
) -> SceneObject:
    """Return a single object, or one of a pair, in a colour that is visible on the background."""
    colour = pick(rng, visible_colours(background))
    size = pick(rng, list(SIZES))
    pattern = (
        PATTERNS[int(rng.choice(3, p=(0.8, 0.1, 0.1)))] if not pair and size == "big" else "plain"
    )
    radius = (PAIR_RADIUS if pair else SIZES[size]) * float(rng.uniform(0.95, 1.05))
    x, y = POSITIONS[position]
    if pair:
        x, y = 0.5 + PAIR_SPREAD * (x - 0.5), 0.5 + PAIR_SPREAD * (y - 0.5)
    centre = (x + float(rng.uniform(-0.02, 0.02)), y + float(rng.uniform(-0.02, 0.02)))
    return SceneObject(
        shape=pick(rng, list(SHAPES)),
        colour=colour,
        size="" if pair else size,
        position=position,
        pattern=pattern,
        rgb=_jitter(rng, COLOURS[colour], 6),
        radius=radius,
        centre=centre,
        angle=float(rng.uniform(-0.08, 0.08)),
    )


def _jitter(rng: np.random.Generator, rgb: Rgb, amount: int) -> Rgb:
    r, g, b = np.clip(rng.integers(-amount, amount + 1, 3) + rgb, 0, 255).tolist()
    return r, g, b


def compose_caption(
    rng: np.random.Generator, background: str, objects: tuple[SceneObject, ...]
) -> str:
    """Return one of several wordings, all of which name shape, colour, position and background."""
    ground = pick(
        rng,
        (
            f"on a {background} background",
            f"{background} background",
            f"the background is {background}",
        ),
    )
    phrases = [
        f"{_noun_phrase(rng, item)} {pick(rng, POSITION_PHRASES[item.position])}"
        for item in objects
    ]
    join = pick(rng, (" and ", ", ", " with "))
    words = (join if len(objects) == 2 else "").join(phrases)
    opening = pick(rng, ("", "", "a picture of ", "an image of "))
    comma = ", " if not ground.startswith("on") or rng.random() < 0.3 else " "
    if rng.random() < 0.15:
        return f"{ground}, {words}"
    return f"{opening}{words}{comma}{ground}"


def _noun_phrase(rng: np.random.Generator, item: SceneObject) -> str:
    size = item.size
    if size == "big":
        size = pick(rng, ("big", "large"))
    elif size:
        size = pick(rng, ("small", "little"))
    words = " ".join(
        word
        for word in (size, item.pattern if item.pattern != "plain" else "", item.colour)
        if word
    )
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words} {item.shape}"


def transform_outline(points: list[Point], item: SceneObject, side: int) -> list[Point]:
    """Map an outline in units of the radius to pixels of an image with that side."""
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    radius, (cx, cy) = item.radius * side, (item.centre[0] * side, item.centre[1] * side)
    return [
        (cx + radius * (x * cos - y * sin), cy + radius * (x * sin + y * cos)) for x, y in points
    ]


def object_mask(item: SceneObject, side: int) -> Image.Image:
    """Return the shape of the object, white on black, one byte per pixel."""
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    filled, cut = OUTLINES[item.shape]
    pen.polygon(transform_outline(filled, item, side), fill=255)
    if cut is not None:
        pen.polygon(transform_outline(cut, item, side), fill=0)
    return mask
