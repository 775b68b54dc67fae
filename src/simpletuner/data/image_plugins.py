"""Image files by their content, and the decoders that are extras: JPEG XL and HEIC."""

from __future__ import annotations

from functools import cache
from typing import BinaryIO

from PIL import Image, features

# What may be decoded, by content and not by name. Formats that run programs (EPS) are not among
# them.
IMAGE_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    *(("AVIF",) if features.check("avif") else ()),
)
START_BYTES = 64
JXL_STARTS = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a")
HEIF_BRANDS = frozenset(
    (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
)
# Pillow's name of a format -> its usual name, and what installs a decoder.
DECODERS = {
    "JXL": ("JPEG XL", "pip install 'simpletuner[jxl]'"),
    "HEIF": ("HEIC", "pip install 'simpletuner[heic]'"),
    "AVIF": ("AVIF", "pip install 'pillow>=11.3'"),
}


class MissingDecoder(Exception):
    """An image of a format that nothing here decodes; the text says what to install."""

    def __init__(self, kind: str) -> None:
        name, command = DECODERS[kind]
        super().__init__(f"{name} needs a decoder: {command}, or save it as PNG or JPEG")


def open_image(stream: BinaryIO) -> Image.Image:
    """Open an image of an allowed format. Raises MissingDecoder, or what Pillow raises."""
    kind = identify_format(stream)
    if kind is None:
        return Image.open(stream, formats=IMAGE_FORMATS)
    if not load_decoder(kind):
        raise MissingDecoder(kind)
    return Image.open(stream, formats=(kind,))


def identify_format(stream: BinaryIO) -> str | None:
    """Return the key of DECODERS whose files start like this one, or None for other formats.

    The stream is left at its start.
    """
    start = stream.read(START_BYTES)
    stream.seek(0)
    if start.startswith(JXL_STARTS):
        return "JXL"
    if start[4:8] != b"ftyp":
        return None
    length = int.from_bytes(start[:4], "big")
    brands = {start[8:12], *(start[at : at + 4] for at in range(16, min(length, 64), 4))}
    if brands & {b"avif", b"avis"}:
        return None if "AVIF" in IMAGE_FORMATS else "AVIF"
    return "HEIF" if brands & HEIF_BRANDS else None


@cache
def load_decoder(kind: str) -> bool:
    """Register a plugin with Pillow; return whether it is installed."""
    try:
        if kind == "JXL":
            import pillow_jxl  # noqa: F401, importing it registers it
        elif kind == "HEIF":
            import pillow_heif

            pillow_heif.register_heif_opener()
        else:
            return False
    except ImportError:
        return False
    return True
