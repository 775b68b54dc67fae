"""Endless captioned pictures of plain shapes, drawn by program: what chroma-nano is trained on.

    python recipes/nano/draw.py --out DIR --count 20000 --seed 1

writes DIR/00000.png and DIR/00000.txt, ... as `caption_strategy: textfile` reads them. Picture N of a seed
is always the same picture, whatever the count: draw more, or draw again, and nothing else changes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from simpletuner.randomness import seed_at

Rgb = tuple[int, int, int]
Point = tuple[float, float]

SIDE_PX = 128
SUPERSAMPLING = 3

COLOURS: dict[str, Rgb] = {
    "red": (215, 35, 40), "orange": (245, 130, 25), "yellow": (250, 215, 45), "green": (45, 160, 65),
    "blue": (40, 90, 215), "purple": (130, 55, 170), "pink": (245, 115, 175), "brown": (125, 75, 40),
    "black": (20, 20, 22), "white": (252, 252, 252),
}  # fmt: skip
BACKGROUNDS: dict[str, Rgb] = {
    "light grey": (200, 200, 202), "dark grey": (75, 76, 80), "cream": (250, 236, 200),
    "sky blue": (150, 200, 240), "mint": (175, 235, 205), "lavender": (200, 185, 240),
    "peach": (250, 200, 165), "navy": (22, 30, 85), "teal": (15, 105, 110), "olive": (112, 112, 45),
}  # fmt: skip
SIZES = {"big": 0.285, "small": 0.155}  # radius as a share of the side
PAIR_RADIUS = 0.19
POSITIONS: dict[str, Point] = {
    "centre": (0.5, 0.5), "left": (0.315, 0.5), "right": (0.685, 0.5),
    "top": (0.5, 0.315), "bottom": (0.5, 0.685),
}  # fmt: skip
PAIRS = (("left", "right"), ("top", "bottom"))
PLACES = {
    "centre": ("in the centre", "in the middle"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
PATTERNS = ("plain", "striped", "dotted")
CONTRAST = 95.0  # least RGB distance between an object and what lies under it


@dataclass(frozen=True)
class Thing:
    """One object. radius and centre: shares of the picture's side. angle: radians from upright."""

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
    """Everything in one picture and the words for it."""

    background: str
    background_rgb: Rgb
    things: tuple[Thing, ...]
    caption: str


def generator(seed: int, purpose: str, *where: int | str) -> np.random.Generator:
    """A fresh generator for one address."""
    return np.random.Generator(np.random.Philox(seed_at(seed, purpose, *where)))


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def regular(points: int, inner: float = 1.0, start: float = -math.pi / 2) -> list[Point]:
    """Corners of a polygon in the unit circle; every other one at the inner radius when that is below 1."""
    count = points * (2 if inner < 1 else 1)
    radii = [inner if inner < 1 and i % 2 else 1.0 for i in range(count)]
    angles = [start + 2 * math.pi * i / count for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)]


def heart() -> list[Point]:
    turns = np.linspace(0, 2 * math.pi, 90, endpoint=False)
    x = 16 * np.sin(turns) ** 3
    y = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns))
    return [(float(a) / 17, float(b + 2.5) / 17) for a, b in zip(x, y)]


def circle(radius: float = 1.0, centre: Point = (0.0, 0.0)) -> list[Point]:
    turns = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    return [(centre[0] + radius * math.cos(t), centre[1] + radius * math.sin(t)) for t in turns]


def cross(arm: float = 0.34) -> list[Point]:
    a = arm
    return [
        (-a, -1),
        (a, -1),
        (a, -a),
        (1, -a),
        (1, a),
        (a, a),
        (a, 1),
        (-a, 1),
        (-a, a),
        (-1, a),
        (-1, -a),
        (-a, -a),
    ]


def square() -> list[Point]:
    return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]


def diamond() -> list[Point]:
    return [(0, -1.08), (0.72, 0), (0, 1.08), (-0.72, 0)]


def triangle() -> list[Point]:
    return [(0, -0.95), (1.0, 0.8), (-1.0, 0.8)]


# name -> (outlines that are filled, outlines that are cut out), in units of the radius, y downwards
SHAPES: dict[str, tuple[Callable[[], list[Point]], Callable[[], list[Point]] | None]] = {
    "circle": (circle, None),
    "square": (square, None),
    "triangle": (triangle, None),
    "star": (lambda: regular(5, inner=0.42), None),
    "heart": (heart, None),
    "cross": (cross, None),
    "ring": (circle, lambda: circle(0.55)),
    "diamond": (diamond, None),
    "crescent": (circle, lambda: circle(0.85, (0.48, -0.1))),
}


def compose(seed: int, number: int) -> Scene:
    """Scene `number` of a seed: a pure function of the two."""
    rng = generator(seed, "scene", number)
    background = pick(rng, list(BACKGROUNDS))
    if rng.random() < 0.3:
        first, second = PAIRS[int(rng.integers(len(PAIRS)))]
        things = (_thing(rng, background, first, pair=True), _thing(rng, background, second, pair=True))
    else:
        things = (_thing(rng, background, pick(rng, list(POSITIONS)), pair=False),)
    ground = _jitter(rng, BACKGROUNDS[background], 3)
    return Scene(background, ground, things, caption(rng, background, things))


def single_thing(rng: np.random.Generator, background: str, position: str) -> Thing:
    """A thing that stands alone; its colour is one that can be seen on the background."""
    return _thing(rng, background, position, pair=False)


def _thing(rng: np.random.Generator, background: str, position: str, pair: bool) -> Thing:
    under = np.array(BACKGROUNDS[background])
    seen = [name for name, rgb in COLOURS.items() if np.linalg.norm(under - np.array(rgb)) >= CONTRAST]
    colour = pick(rng, seen)
    size = pick(rng, list(SIZES))
    pattern = PATTERNS[int(rng.choice(3, p=(0.8, 0.1, 0.1)))] if not pair and size == "big" else "plain"
    radius = (PAIR_RADIUS if pair else SIZES[size]) * float(rng.uniform(0.95, 1.05))
    x, y = POSITIONS[position]
    if pair:
        x, y = 0.5 + 1.32 * (x - 0.5), 0.5 + 1.32 * (y - 0.5)
    centre = (x + float(rng.uniform(-0.02, 0.02)), y + float(rng.uniform(-0.02, 0.02)))
    return Thing(
        shape=pick(rng, list(SHAPES)), colour=colour, size="" if pair else size, position=position,
        pattern=pattern, rgb=_jitter(rng, COLOURS[colour], 6), radius=radius, centre=centre,
        angle=float(rng.uniform(-0.08, 0.08)),
    )  # fmt: skip


def _jitter(rng: np.random.Generator, rgb: Rgb, amount: int) -> Rgb:
    r, g, b = (int(np.clip(v + rng.integers(-amount, amount + 1), 0, 255)) for v in rgb)
    return r, g, b


def caption(rng: np.random.Generator, background: str, things: tuple[Thing, ...]) -> str:
    """One of several wordings; all of them name shape, colour, position and background."""
    ground = pick(
        rng, (f"on a {background} background", f"{background} background", f"the background is {background}")
    )
    phrases = [f"{_noun(rng, thing)} {pick(rng, PLACES[thing.position])}" for thing in things]
    join = pick(rng, (" and ", ", ", " with "))
    words = (join if len(things) == 2 else "").join(phrases)
    opening = pick(rng, ("", "", "a picture of ", "an image of "))
    comma = ", " if not ground.startswith("on") or rng.random() < 0.3 else " "
    if rng.random() < 0.15:
        return f"{ground}, {words}"
    return f"{opening}{words}{comma}{ground}"


def _noun(rng: np.random.Generator, thing: Thing) -> str:
    size = thing.size
    if size == "big":
        size = pick(rng, ("big", "large"))
    elif size:
        size = pick(rng, ("small", "little"))
    words = " ".join(
        word for word in (size, thing.pattern if thing.pattern != "plain" else "", thing.colour) if word
    )
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words} {thing.shape}"


def outline(points: list[Point], thing: Thing, side: int) -> list[Point]:
    """Unit outline -> picture coordinates at the given side."""
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    radius, (cx, cy) = thing.radius * side, (thing.centre[0] * side, thing.centre[1] * side)
    return [(cx + radius * (x * cos - y * sin), cy + radius * (x * sin + y * cos)) for x, y in points]


def render(scene: Scene, side_px: int = SIDE_PX) -> Image.Image:
    """RGB picture, antialiased by drawing larger and averaging down."""
    side = side_px * SUPERSAMPLING
    picture = Image.new("RGB", (side, side), scene.background_rgb)
    for thing in scene.things:
        mask = Image.new("L", (side, side), 0)
        pen = ImageDraw.Draw(mask)
        filled, cut = SHAPES[thing.shape]
        pen.polygon(outline(filled(), thing, side), fill=255)
        if cut is not None:
            pen.polygon(outline(cut(), thing, side), fill=0)
        picture.paste(_fill(thing, side), (0, 0), mask)
    return picture.resize((side_px, side_px), Image.Resampling.BOX)


def _fill(thing: Thing, side: int) -> Image.Image:
    layer = Image.new("RGB", (side, side), thing.rgb)
    if thing.pattern == "plain":
        return layer
    mark = (250, 250, 250) if sum(thing.rgb) < 480 else (30, 30, 34)
    pen, step = ImageDraw.Draw(layer), side // 11
    if thing.pattern == "striped":
        for y in range(0, side, step):
            pen.rectangle((0, y, side, y + step // 2), fill=mark)
        return layer
    for row, y in enumerate(range(step // 2, side, step)):
        for x in range(step // 2 + (row % 2) * step // 2, side, step):
            pen.ellipse((x - step // 4, y - step // 4, x + step // 4, y + step // 4), fill=mark)
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw captioned pictures of plain shapes.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for number in range(args.count):
        scene = compose(args.seed, number)
        render(scene).save(args.out / f"{number:05d}.png")
        (args.out / f"{number:05d}.txt").write_text(scene.caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
