"""What chroma-nano's VAE is trained and measured on: drawings and synthetic textures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from make_shapes_dataset import render_scene
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from simpletuner.validation.shapes.scenes import SIDE_PX, compose_scene, random_generator

TRAIN_SEED, UNSEEN_SEED = 11, 12
TEXTURES, RECOLOURED = 0.35, 0.2  # shares


class BatchAddress(NamedTuple):
    """Which batch: a pure function of these three. side: SIDE_PX, or less for random crops."""

    step: int
    size: int
    side: int


def make_texture(rng: np.random.Generator, side: int) -> Image.Image:
    """Roughly a photograph's statistics: coloured noise of many scales, flat objects on it."""
    pixels = np.zeros((side, side, 3))
    for scale in (2, 4, 8, 16, 32, 64):
        coarse = rng.normal(size=(scale, scale, 3)) * rng.uniform(0, 1) / scale**0.8
        grey = rng.normal(size=(scale, scale, 1)) * rng.uniform(0, 1.5) / scale**0.8
        layer = coarse + grey
        for channel in range(3):
            grown = Image.fromarray(layer[..., channel].astype(np.float32)).resize(
                (side, side), Image.BICUBIC
            )
            pixels[..., channel] += np.asarray(grown)
    pixels = pixels / (pixels.std() + 1e-6) * rng.uniform(15, 60) + rng.uniform(40, 215, size=3)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    big = image.resize((side * 2, side * 2), Image.BILINEAR)
    pen = ImageDraw.Draw(big)
    for _ in range(int(rng.integers(0, 12))):
        colour = tuple(int(v) for v in rng.integers(0, 256, size=3))
        xy = rng.uniform(-0.1, 1.1, size=(int(rng.integers(2, 6)), 2)) * side * 2
        kind = rng.integers(4)
        if kind == 0:
            pen.line([tuple(p) for p in xy], fill=colour, width=int(rng.integers(2, 12)))
        elif kind == 1 and len(xy) > 2:
            pen.polygon([tuple(p) for p in xy], fill=colour)
        else:
            (x, y), radius = xy[0], rng.uniform(4, side * 0.6, size=2)
            box = (x - radius[0], y - radius[1], x + radius[0], y + radius[1])
            pen.ellipse(box, fill=colour) if kind == 2 else pen.rectangle(box, fill=colour)
    image = big.resize((side, side), Image.BOX)
    return (
        image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 2))))
        if rng.random() < 0.3
        else image
    )


def make_image(seed: int, number: int) -> Image.Image:
    """A drawing, in one case of five with other colours, or (one in three) a texture."""
    rng = random_generator(seed, "vae picture", number)
    if rng.random() < TEXTURES:
        return make_texture(rng, SIDE_PX)
    drawing = render_scene(compose_scene(seed, number))
    if rng.random() < RECOLOURED:
        pixels = np.asarray(drawing)[..., rng.permutation(3)]
        drawing = Image.fromarray(
            np.ascontiguousarray(pixels if rng.random() < 0.5 else 255 - pixels)
        )
    return drawing


def make_batch(address: BatchAddress) -> np.ndarray:
    """(size, side, side, 3) uint8. Two crops are taken of each image where the side is smaller."""
    step, size, side = address
    rng = random_generator(TRAIN_SEED, "vae crops", step)
    crops = []
    each = 1 if side == SIDE_PX else 2
    for index in range(size // each):
        pixels = np.asarray(make_image(TRAIN_SEED, step * size + index))
        for _ in range(each):
            top, left = rng.integers(0, SIDE_PX - side + 1, size=2)
            crops.append(pixels[top : top + side, left : left + side])
    return np.stack(crops)


def to_pixels(levels: np.ndarray, device: torch.device) -> Tensor:
    """(N, side, side, 3) uint8 -> (N, 3, side, side) in [-1, 1], channels last in memory."""
    pixels = torch.from_numpy(levels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def unseen_images(count: int, drawn: bool, device: torch.device) -> Tensor:
    """(count, 3, SIDE_PX, SIDE_PX): drawings or textures that are never trained on."""
    images = [
        render_scene(compose_scene(UNSEEN_SEED, number))
        if drawn
        else make_texture(random_generator(UNSEEN_SEED, "texture", number), SIDE_PX)
        for number in range(count)
    ]
    return to_pixels(np.stack([np.asarray(one) for one in images]), device)
