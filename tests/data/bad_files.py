"""The bad-input catalogue: each row is a folder made by a program, and what must become of it."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

E_ACUTE = "\u00e9"


@dataclass(frozen=True)
class Row:
    """make: fills a folder with the one bad thing. reason: code of the rejection by the scan, "" when kept.

    decode: reason of BadFile when the scan keeps it but the pixels are bad. note: words of an event.
    Rows named as in PASSED_OVER are no pictures at all.
    """

    name: str
    make: Callable[[Path], object]
    reason: str = ""
    decode: str = ""
    note: str = ""


def picture(size: tuple[int, int] = (96, 64), mode: str = "RGB") -> Image.Image:
    """Noise, so that files have a length worth truncating."""
    noise = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + idat + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def write(folder: Path, name: str | bytes, data: bytes, caption: bytes | None = b"a thing") -> None:
    raw = os.fsencode(folder) + b"/" + (name if isinstance(name, bytes) else name.encode())
    with open(raw, "wb") as file:
        file.write(data)
    if caption is not None:
        with open(os.path.splitext(raw)[0] + b".txt", "wb") as file:
            file.write(caption)


def image(name: str, data: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: write(folder, name, data())


def caption(text: bytes | None) -> Callable[[Path], None]:
    return lambda folder: write(folder, "x.png", encoded(picture(), "PNG"), text)


def twins(folder: Path) -> None:
    for form in ("NFC", "NFD"):
        write(folder, unicodedata.normalize(form, f"caf{E_ACUTE}.png"), encoded(picture(), "PNG"))


def stems(folder: Path) -> None:
    write(folder, "a.png", encoded(picture(), "PNG"))
    write(folder, "a.jpg", encoded(picture(), "JPEG"))


def frames() -> dict[str, object]:
    return {"save_all": True, "append_images": [picture((96, 64)).rotate(90 * turn) for turn in (1, 2)]}


def float_tiff() -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(1).random((64, 96), np.float32)), "TIFF")


PASSED_OVER = ("hidden file", "svg by name", "files of the system")
BROKEN_EXIF = b"Exif\0\0II*\0\xff\xff\xff\x7f"
PLAIN = encoded(picture(), "PNG")

ROWS = (
    Row("truncated jpeg", image("x.jpg", lambda: encoded(picture(), "JPEG")[:-900]), decode="damaged"),
    Row("truncated png", image("x.png", lambda: encoded(picture(), "PNG")[:-900]), decode="damaged"),
    Row("bit-flipped png", image("x.png", lambda: flipped(encoded(picture(), "PNG"), 900)), decode="damaged"),
    Row("damaged webp", image("x.webp", lambda: encoded(picture(), "WEBP")[:200]), reason="damaged"),
    Row("zero bytes", image("x.jpg", lambda: b""), reason="empty_file"),
    Row("html as jpg", image("x.jpg", lambda: b"<html><body>404</body></html>"), reason="not_an_image"),
    Row("eps as png", image("x.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n"), reason="not_an_image"),
    Row("header cut off", image("x.jpg", lambda: encoded(picture(), "JPEG")[:20]), reason="not_an_image"),
    Row("heic by name", image("x.heic", lambda: b"\0\0\0\x18ftypheic" + b"\0" * 64), reason="not_an_image"),
    Row("bomb of 144 megapixels", image("x.png", lambda: png_header(12000, 12000)), reason="too_many_pixels"),
    Row("bomb of 400 megapixels", image("x.png", lambda: png_header(20000, 20000)), reason="too_many_pixels"),
    Row("header without pixels", image("x.png", lambda: png_header(96, 64)), decode="damaged"),
    Row(
        "animated gif", image("x.gif", lambda: encoded(picture(mode="P"), "GIF", **frames())), note="animated"
    ),
    Row("animated webp", image("x.webp", lambda: encoded(picture(), "WEBP", **frames())), note="animated"),
    Row("animated png", image("x.png", lambda: encoded(picture(), "PNG", **frames())), note="animated"),
    Row("cmyk jpeg", image("x.jpg", lambda: encoded(picture(mode="CMYK"), "JPEG")), note="CMYK"),
    Row("float tiff", image("x.tif", float_tiff), reason="unsupported_pixels"),
    Row("transparency", image("x.png", lambda: encoded(picture(mode="RGBA"), "PNG")), note="transparency"),
    Row("grey", image("x.png", lambda: encoded(picture(mode="L"), "PNG"))),
    Row("grey and alpha", image("x.png", lambda: encoded(picture(mode="LA"), "PNG")), note="transparency"),
    Row("one bit", image("x.png", lambda: encoded(picture(mode="1"), "PNG"))),
    Row("palette", image("x.png", lambda: encoded(picture(mode="P"), "PNG"))),
    Row("broken exif", image("x.jpg", lambda: encoded(picture(), "JPEG", exif=BROKEN_EXIF))),
    Row("broken icc", image("x.png", lambda: encoded(picture(), "PNG", icc_profile=b"not a profile"))),
    Row("one by n", image("x.png", lambda: encoded(picture((1, 300)), "PNG")), reason="aspect_ratio"),
    Row("one by one", image("x.png", lambda: encoded(picture((1, 1)), "PNG")), reason="too_small"),
    Row("emoji, quotes, newline", image("a \U0001f600 'q' \"d\"\nb.png", lambda: PLAIN)),
    Row("name not utf-8", lambda folder: write(folder, b"\xff.png", PLAIN), reason="file_name"),
    Row("nfc and nfd twins", twins, reason="name_twins"),
    Row("same stem twice", stems),
    Row("no caption", caption(None), reason="caption_missing"),
    Row("blank caption", caption(b" \r\n\t\n"), reason="caption_missing"),
    Row("latin-1 caption", caption("caf\u00e9".encode("latin-1")), reason="caption_encoding"),
    Row("utf-16 caption", caption("a cat".encode("utf-16")), reason="caption_encoding"),
    Row("utf-16 caption without mark", caption("a cat".encode("utf-16-le")), reason="caption_encoding"),
    Row("caption with mark and crlf", caption(b"\xef\xbb\xbfone\r\ntwo\r\n")),
    Row(
        "dangling link",
        lambda folder: (folder / "x.png").symlink_to(folder / "gone.png"),
        reason="unreadable",
    ),
    Row("named pipe", lambda folder: os.mkfifo(folder / "x.png"), reason="unreadable"),
    Row("link to itself", lambda folder: (folder / "x.png").symlink_to("x.png"), reason="unreadable"),
    Row("svg by name", lambda folder: write(folder, "x.svg", b"<svg/>", None), note="not read: 1 .svg"),
    Row("files of the system", lambda folder: write(folder, "Thumbs.db", b"\xd0\xcf", None)),
    Row("hidden file", lambda folder: write(folder, "._x.png", b"\0" * 40)),
)
