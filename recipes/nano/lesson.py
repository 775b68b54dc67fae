"""Draw the example's sixteen pictures: a zorbo, a friendly robot that chroma-nano has never seen.

    python recipes/nano/lesson.py --out src/simpletuner/examples/chroma-nano.peft-lora/zorbo
    python recipes/nano/lesson.py --out DIR --first 16 --count 32       (unseen ones, to measure with)

Backgrounds, colours, sizes, positions and wordings are the base's own, so that a prompt still controls them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from simpletuner.validation.shapes.world import (
    COLOURS,
    SIDE_PX,
    SUPERSAMPLING,
    Point,
    Rgb,
    Scene,
    Thing,
    circle,
    outline,
)
from simpletuner.validation.shapes.zorbo import DARK, LAMP, LIGHT, compose_lesson


def box(left: float, top: float, right: float, bottom: float, corner: float = 0.0) -> list[Point]:
    """Outline of a box with its corners cut."""
    c = corner
    return [(left + c, top), (right - c, top), (right, top + c), (right, bottom - c),
            (right - c, bottom), (left + c, bottom), (left, bottom - c), (left, top + c)]  # fmt: skip


def parts(body: Rgb) -> list[tuple[list[Point], Rgb]]:
    """Painted in this order: ears, antenna, lamp, head, eyes, pupils, mouth, teeth."""
    teeth = [(box(x - 0.1, 0.56, x + 0.1, 0.78), LIGHT) for x in (-0.36, 0.0, 0.36)]
    return [
        (box(-1.08, 0.0, 1.08, 0.45), DARK),
        (box(-0.08, -0.9, 0.08, -0.4), DARK),
        (circle(0.2, (0.0, -0.95)), LAMP),
        (box(-0.92, -0.52, 0.92, 0.98, corner=0.2), body),
        (circle(0.31, (-0.42, 0.05)), LIGHT),
        (circle(0.31, (0.42, 0.05)), LIGHT),
        (circle(0.15, (-0.42, 0.08)), DARK),
        (circle(0.15, (0.42, 0.08)), DARK),
        (box(-0.58, 0.5, 0.58, 0.84), DARK),
        *teeth,
    ]


def render_lesson(scene: Scene, side_px: int = SIDE_PX) -> Image.Image:
    side = side_px * SUPERSAMPLING
    picture = Image.new("RGB", (side, side), scene.background_rgb)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        _paint(pen, thing, side)
    return picture.resize((side_px, side_px), Image.Resampling.BOX)


def _paint(pen: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    for points, colour in parts(COLOURS[thing.colour]):
        pen.polygon(outline(points, thing, side), fill=colour)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw captioned zorbos.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=16)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for number in range(args.first, args.first + args.count):
        scene = compose_lesson(number)
        render_lesson(scene).save(args.out / f"{number:02d}.png", optimize=True)
        (args.out / f"{number:02d}.txt").write_text(scene.caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
