"""Damaged images of every format that Pillow reads here."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

from simpletuner.config.schema import DataOptions
from simpletuner.data.image_plugins import IMAGE_FORMATS
from simpletuner.data.pixels import load_pixels, read_image_header
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sample_types import BucketedSample, Sample
from simpletuner.data.sources import LocalFile
from tests.data.unusable_files import encode_image, noise_image
from tests.faults.outcomes import Lost, Tally

MODES = {"GIF": "P", "JPEG": "RGB", "PPM": "RGB"}


def damage(generator: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or blank; more often near the start, where the headers are."""
    content = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 5, 20))):
        near = generator.random() < 0.6
        at = generator.randrange(min(len(content), 200) if near else len(content))
        match generator.randrange(5):
            case 0:
                content[at] ^= 1 << generator.randrange(8)
            case 1:
                del content[at + 8 :]
            case 2:
                content[at : at + 4] = generator.randbytes(4)
            case 3:
                content[at:at] = generator.randbytes(generator.choice((1, 4, 64)))
            case _:
                content[at : at + 16] = b"\xff" * 16
        content = content or bytearray(b"x")
    return bytes(content)


def damaged_images(generator: random.Random, root: Path, count: int) -> Tally:
    tally = Tally("damaged images")
    root.mkdir(parents=True, exist_ok=True)
    sound = {
        kind: encode_image(noise_image(mode=MODES.get(kind, "RGBA")).resize((24, 16)), kind)
        for kind in IMAGE_FORMATS
    }
    path = root / "image"
    file, options = LocalFile(path), DataOptions(max_image_megapixels=1)

    def attempt() -> None:
        try:
            header = read_image_header(file, options.max_image_megapixels)
            size = header.size_px
            sample = Sample("d/x", "d", file, *size, ("c",))
            pixels = load_pixels(BucketedSample(sample, size, (0, 0), size), options)
        except UnusableFile:
            return
        if pixels.shape != (size[1], size[0], 3):
            raise Lost(f"{pixels.shape} instead of {size}")

    Image.MAX_IMAGE_PIXELS = None
    for number in range(count):
        kind = IMAGE_FORMATS[number % len(IMAGE_FORMATS)]
        path.write_bytes(damage(generator, sound[kind]))
        tally.try_one(f"{kind} number {number}", attempt)
    return tally
