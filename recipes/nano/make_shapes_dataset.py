"""Endless captioned pictures of plain shapes, drawn by program: what chroma-nano is trained on.

    python recipes/nano/make_shapes_dataset.py --out DIR --count 20000 --seed 1

writes DIR/00000.png and DIR/00000.txt, ... as `caption_strategy: textfile` reads them. Picture N of
a seed is always the same picture, whatever the count: draw more, or draw again, and nothing else
changes. What there is to draw, and the words for it, is `simpletuner.validation.shapes.scenes`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from simpletuner.validation.shapes.scenes import (
    SIDE_PX,
    SUPERSAMPLING,
    Scene,
    SceneObject,
    compose_scene,
    object_mask,
)


def render_scene(scene: Scene, side_px: int = SIDE_PX) -> Image.Image:
    """RGB picture, antialiased by drawing larger and averaging down."""
    side = side_px * SUPERSAMPLING
    picture = Image.new("RGB", (side, side), scene.background_rgb)
    for thing in scene.objects:
        picture.paste(_render_surface(thing, side), (0, 0), object_mask(thing, side))
    return picture.resize((side_px, side_px), Image.Resampling.BOX)


def _render_surface(thing: SceneObject, side: int) -> Image.Image:
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
        scene = compose_scene(args.seed, number)
        render_scene(scene).save(args.out / f"{number:05d}.png")
        (args.out / f"{number:05d}.txt").write_text(scene.caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
