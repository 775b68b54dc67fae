"""One image to start generating from, and its mask: fitted to a bucket as training images are.

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageChops

from simpletuner.config.schema import DataOptions
from simpletuner.data.geometry import (
    ASPECT_TOLERANCE,
    ImageSize,
    ResizeCropConfig,
    bucket_size,
    covering_size,
    crop_position,
)
from simpletuner.data.pixels import load_pixels, read_image_header
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sample_types import BucketedSample, Sample
from simpletuner.data.sources import LocalFile
from simpletuner.errors import ConfigError, Problem

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class StartImageRequest:
    """An image to start from, before anything is decoded.

    denoise: the noise level at which sampling starts, in (0, 1]; 1 ignores the image. mask_path:
    white keeps the image, black is generated; None generates everywhere. invert_mask: the reverse.
    """

    image_path: Path
    denoise: float
    mask_path: Path | None = None
    invert_mask: bool = False


def read_size(path: Path, option: str) -> ImageSize:
    """Return the size of an image file after EXIF orientation; only its header is read.

    Raises ConfigError, which names the option, when the file is not an image that can be used.
    """
    try:
        return read_image_header(LocalFile(path), DataOptions().max_image_megapixels).size_px
    except UnusableFile as error:
        raise ConfigError([Problem(option, f"{path}: {error}")]) from None


def check_request(request: StartImageRequest, image_option: str, mask_option: str = "") -> None:
    """Raise ConfigError unless both files are images of the same aspect ratio."""
    width, height = read_size(request.image_path, image_option)
    if request.mask_path is None:
        return
    mask_width, mask_height = read_size(request.mask_path, mask_option)
    if abs(mask_width * height / (mask_height * width) - 1) > ASPECT_TOLERANCE:
        raise ConfigError(
            [
                Problem(
                    mask_option,
                    f"{request.mask_path} is {mask_width}x{mask_height} px and the image is "
                    f"{width}x{height}; a mask has the size of its image, or the same aspect ratio",
                )
            ]
        )


def place_start_image(path: Path, size: ImageSize, alignment_px: int) -> BucketedSample:
    """Fit an image to the requested size: its own aspect ratio in a bucket of that area.

    A size that is not a square is met exactly; the image is then cropped to it from its centre.
    """
    own = read_size(path, "image")
    bucket = size
    if size[0] == size[1]:
        bucket = bucket_size(ResizeCropConfig(sqrt(size[0] * size[1])), own, alignment_px)
    resized = covering_size(own, bucket)
    sample = Sample(path.name, "", LocalFile(path), *own, ("",))
    return BucketedSample(sample, resized, crop_position("center", resized, bucket, 0), bucket)


def load_start_pixels(placed: BucketedSample) -> np.ndarray:
    """Return the fitted image, (H, W, 3) uint8 sRGB. Raises ConfigError for a damaged file."""
    try:
        return load_pixels(placed, DataOptions())
    except UnusableFile as error:
        raise ConfigError([Problem(placed.sample.file.address, str(error))]) from None


def load_mask(request: StartImageRequest, placed: BucketedSample) -> Image.Image | None:
    """Return the mask of the fitted image, mode L; 255 keeps the image. None without a mask.

    It is resized and cropped as its image is; colours count by their luminance.
    """
    if request.mask_path is None:
        return None
    mask_size = read_size(request.mask_path, "mask")
    file = LocalFile(request.mask_path)
    mask = BucketedSample(
        Sample(file.name, "", file, *mask_size, ("",)),
        placed.resize_px,
        placed.crop_px,
        placed.bucket_px,
    )
    grey = Image.fromarray(load_start_pixels(mask)).convert("L")
    return ImageChops.invert(grey) if request.invert_mask else grey
