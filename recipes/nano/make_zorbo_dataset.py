"""Draw the example's sixteen pictures of a zorbo: an hourglass, which chroma-nano has never seen.

    python recipes/nano/make_zorbo_dataset.py --out
    src/simpletuner/examples/chroma-nano.peft-lora/zorbo
    python recipes/nano/make_zorbo_dataset.py --out DIR --first 16 --count 32       (unseen ones, to
    measure with)

Backgrounds, colours, sizes, positions and wordings are the base's own, so that a prompt still
controls them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from make_shapes_dataset import render_scene
from PIL import Image

from simpletuner.validation.shapes.scenes import SIDE_PX, SUPERSAMPLING, object_mask
from simpletuner.validation.shapes.zorbo import compose_zorbo_scene


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw captioned zorbos.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--masks", action="store_true", help="also N.mask.png, white on the zorbo")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for number in range(args.first, args.first + args.count):
        scene = compose_zorbo_scene(number)
        render_scene(scene).save(args.out / f"{number:02d}.png", optimize=True)
        if args.masks:
            mask = Image.new("L", (SIDE_PX * SUPERSAMPLING,) * 2)
            for thing in scene.objects:
                mask.paste(255, (0, 0), object_mask(thing, mask.width))
            mask = mask.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
            mask.save(args.out / f"{number:02d}.mask.png", optimize=True)
        (args.out / f"{number:02d}.txt").write_text(scene.caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
