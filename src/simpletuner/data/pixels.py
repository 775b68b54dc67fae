"""Decoding of image files to sRGB pixels. Headers are read without decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from simpletuner.config.schema import DataOptions
from simpletuner.data.image_plugins import (
    MissingDecoder,
    identify_format,
    load_decoder,
    open_image,
)
from simpletuner.data.jxl_header import read_jxl_size
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sample_types import BucketedSample, Sample
from simpletuner.data.sources import SourceFile
from simpletuner.image_decoding import UndecodableImage, decoder_errors

if TYPE_CHECKING:
    import numpy as np  # at run time only where pixels are decoded; headers need none

PIXEL_MODES = frozenset(
    {
        "1",
        "L",
        "LA",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBX",
        "CMYK",
        "YCbCr",
        "I;16",
        "I;16L",
        "I;16B",
        "I",
    }
)
SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B", "I"})
Image.MAX_IMAGE_PIXELS = (
    None  # max_image_megapixels is the limit, also where it is above Pillow's own
)
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageHeader:
    """Facts in the header of an image file. size_px: (width, height) after EXIF orientation."""

    size_px: tuple[int, int]
    mode: str
    is_animated: bool
    has_alpha: bool


def read_image_header(file: SourceFile, max_megapixels: float) -> ImageHeader:
    """Return size and mode without decoding.

    Raises UnusableFile if the file is unreadable, unsupported or larger than the limit.
    """
    with _errors_as_unusable(file), file.open() as stream:
        if identify_format(stream) == "JXL" and load_decoder("JXL"):
            size = read_jxl_size(stream)  # its plugin would decode the image
            check_pixel_count(size, max_megapixels)
            return ImageHeader(size, "RGB", is_animated=False, has_alpha=False)
        with open_image(stream) as image:
            check_pixel_count(image.size, max_megapixels)
            _check_mode(image)
            # Pillow reports a TIFF's size already upright; PNG's own getexif() would decode
            # the image.
            turned = image.format != "TIFF" and _read_orientation(image) >= 5
            animated = (
                isinstance(image, (GifImageFile, PngImageFile, WebPImageFile)) and image.is_animated
            )
            size = image.size[::-1] if turned else image.size
            return ImageHeader(size, image.mode, animated, image.has_transparency_data)


def check_pixel_count(size_px: tuple[int, int], max_megapixels: float) -> None:
    """Raise UnusableFile for an image that is larger than the limit."""
    width, height = size_px
    if width * height > max_megapixels * 1e6:
        described_size = f"{width}x{height} is {width * height / 1e6:.0f} megapixels"
        raise UnusableFile(
            "too_many_pixels", f"{described_size}; max_image_megapixels is {max_megapixels:g}"
        )


def load_pixels(placed: BucketedSample, options: DataOptions) -> np.ndarray:
    """Return the image as it is trained on: (H, W, 3) uint8 sRGB of the bucket.

    The image is upright by EXIF; an embedded ICC profile is converted to sRGB (an unreadable one
    counts as sRGB); 16-bit grey is divided by 257; transparency is laid over alpha_background; of
    an animation the first frame is used; then Lanczos resize and crop. Raises UnusableFile when the
    file is damaged, truncated or no longer has the size that was scanned.
    """
    import numpy as np

    upright_image = load_upright(placed.sample, options)
    left, top = placed.crop_px
    width, height = placed.bucket_px
    upright_image = upright_image.resize(placed.resize_px, Image.Resampling.LANCZOS)
    return np.array(upright_image.crop((left, top, left + width, top + height)))


def load_upright(
    sample: Sample, options: DataOptions, least_px: tuple[int, int] | None = None
) -> Image.Image:
    """Return the whole image, upright and in sRGB, as `load_pixels` reads it.

    least_px: (width, height) that suffice. A JPEG is then decoded at a half, a quarter or an eighth
    of its size where the result covers them, which is faster; other formats have no such decoder.
    Raises UnusableFile like `load_pixels`.
    """
    scanned = f"but was {sample.width_px}x{sample.height_px} when the dataset was scanned"
    with (
        _errors_as_unusable(sample.file),
        sample.file.open() as stream,
        _open_as_scanned(stream, sample, scanned) as image,
    ):
        _check_mode(image)
        if (
            image.width * image.height != sample.width_px * sample.height_px
        ):  # checked before the image is decoded
            raise UnusableFile("changed", f"is {image.width}x{image.height}, {scanned}")
        turned = (image.height, image.width) == (sample.width_px, sample.height_px)
        if least_px is not None and image.mode in ("L", "RGB"):
            image.draft(None, least_px[::-1] if turned else least_px)
        reduced = (sample.width_px, sample.height_px) != (
            (image.height, image.width) if turned else image.size
        )
        image.load()
        upright = EXIF_TRANSPOSES.get(_read_orientation(image))
        upright_image = image.transpose(upright) if upright is not None else image
        if not reduced and upright_image.size != (sample.width_px, sample.height_px):
            raise UnusableFile(
                "changed", f"is {upright_image.width}x{upright_image.height}, {scanned}"
            )
        return _to_srgb(upright_image, ImageColor.getrgb(options.alpha_background)[:3])


def _open_as_scanned(stream: BinaryIO, sample: Sample, scanned: str) -> Image.Image:
    """Open an image; one that has grown since the scan is refused before it is decoded."""
    if identify_format(stream) == "JXL":
        size = read_jxl_size(stream)
        if size != (sample.width_px, sample.height_px):
            raise UnusableFile("changed", f"is {size[0]}x{size[1]}, {scanned}")
    return open_image(stream)


def open_upright(file: SourceFile) -> Image.Image:
    """Return a decoded image as its file holds it, upright by EXIF. Raises UnusableFile."""
    with (
        _errors_as_unusable(file),
        file.open() as stream,
        open_image(stream) as image,
    ):
        _check_mode(image)
        image.load()
        upright = EXIF_TRANSPOSES.get(_read_orientation(image))
        turned: Image.Image = image if upright is None else image.transpose(upright)
        return turned


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Return 16-bit grey divided by 257, as RGB; convert("RGB") would clip it above 255."""
    import numpy as np

    levels = (np.asarray(image).astype(np.uint32) + 128) // 257
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _to_srgb(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode in SIXTEEN_BIT_MODES:
        return to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = Image.new("RGB", image.size, tuple(background))
        opaque.paste(_convert_profile(image.convert("RGB"), profile), mask=image.getchannel("A"))
        return opaque
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    return _convert_profile(image, profile)


def _convert_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            turned = ImageCms.profileToProfile(
                image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if turned is not None:
                return turned
    return image.convert("RGB")


def _read_orientation(image: Image.Image) -> int:
    if image.format == "JXL" and not vars(image)["jpeg"]:
        return 1  # its decoder has turned the pixels, except those of a packed JPEG
    try:
        with decoder_errors():
            return int(Image.Image.getexif(image).get(0x0112, 1))
    except UndecodableImage:
        return 1  # with unreadable EXIF data the pixels are still usable


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise UnusableFile(
            "unsupported_pixels", "floating-point pixels have no defined white; export 8 or 16 bit"
        )
    if image.mode not in PIXEL_MODES or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise UnusableFile(
            "unsupported_pixels", f"pixels of mode {image.mode} are not supported; export 8-bit RGB"
        )


@contextlib.contextmanager
def _errors_as_unusable(file: SourceFile) -> Iterator[None]:
    try:
        with decoder_errors(UnusableFile, MissingDecoder):
            yield
    except MissingDecoder as error:
        raise UnusableFile("no_decoder", str(error)) from error
    except UndecodableImage as error:
        raise _to_unusable_file(file, error.__cause__ or error) from error


def _to_unusable_file(file: SourceFile, error: BaseException) -> UnusableFile:
    if isinstance(error, UnidentifiedImageError):
        with file.open() as stream:
            start = stream.read(16)
        if not start:
            return UnusableFile("empty_file", "the file is empty")
        return UnusableFile(
            "not_an_image",
            f"not an image that can be read (starts with {ascii(start)[1:]}); save it as PNG or "
            "JPEG",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return UnusableFile("unreadable", f"cannot be read: {error.strerror}")
    return UnusableFile("damaged", f"cannot be decoded: {str(error) or type(error).__name__}")
