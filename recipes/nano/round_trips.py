"""Enlarged drawings and textures beside what a VAE makes of them, to be looked at.

    python recipes/nano/round_trips.py --vae DIR --out round-trips.png

One unseen drawing of every shape, then textures: on the left the original, on the right the decoded
mean of its posterior, three times as large, without smoothing. No transformer can be sharper than
the right one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from make_shapes_dataset import render_scene
from PIL import Image
from vae_images import UNSEEN_SEED, unseen_images

from simpletuner.validation.shapes.scenes import SHAPES, SIDE_PX, compose_scene
from simpletuner.validation.validation_images import pixels_to_image

ENLARGED, COLUMNS, GAP_PX, TEXTURES = 3, 3, 6, 3


def one_of_every_shape() -> Iterator[Image.Image]:
    wanted = list(SHAPES)
    for number in count():
        scene = compose_scene(UNSEEN_SEED, number)
        if scene.objects[0].shape in wanted:
            wanted.remove(scene.objects[0].shape)
            yield render_scene(scene)
        if not wanted:
            return


def sheet(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    side = SIDE_PX * ENLARGED
    rows = -(-len(pairs) // COLUMNS)
    width, height = 2 * side + 2 * GAP_PX, side + GAP_PX
    page = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    for index, pair in enumerate(pairs):
        for half, image in enumerate(pair):
            place = (index % COLUMNS * width + half * side, index // COLUMNS * height)
            page.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
    return page


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Enlarged images through a VAE and back.")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.vae).float()
    cpu = torch.device("cpu")
    textures = [pixels_to_image(one) for one in unseen_images(TEXTURES, False, cpu).split(1)]
    originals = [*one_of_every_shape(), *textures]
    pixels = [torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in originals]
    batch = torch.stack(pixels).view(-1, SIDE_PX, SIDE_PX, 3).permute(0, 3, 1, 2) / 127.5 - 1
    decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample
    pairs = list(zip(originals, [pixels_to_image(one) for one in decoded.split(1)]))
    sheet(pairs).save(args.out)


if __name__ == "__main__":
    main()
