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
class BadFileCase:
    """make: fills a folder with the one bad thing. reason: code of the rejection by the scan, ""
    when kept.

    decode: reason of BadFile when the scan keeps it but the pixels are bad. note: words of an
    event. Rows named as in PASSED_OVER are no pictures at all.
    """

    name: str
    make: Callable[[Path], object]
    reason: str = ""
    decode: str = ""
    note: str = ""


def noise_image(size: tuple[int, int] = (96, 64), mode: str = "RGB") -> Image.Image:
    """Noise, so that files have a length worth truncating."""
    noise = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def encode_image(image: Image.Image, kind: str, **settings: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = png_chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + idat + png_chunk(b"IEND", b"")


def flip_byte(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def write_sample(
    folder: Path, name: str | bytes, data: bytes, caption: bytes | None = b"a thing"
) -> None:
    raw = os.fsencode(folder) + b"/" + (name if isinstance(name, bytes) else name.encode())
    with open(raw, "wb") as file:
        file.write(data)
    if caption is not None:
        with open(os.path.splitext(raw)[0] + b".txt", "wb") as file:
            file.write(caption)


def image_writer(name: str, data: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: write_sample(folder, name, data())


def caption_writer(text: bytes | None) -> Callable[[Path], None]:
    return lambda folder: write_sample(folder, "x.png", encode_image(noise_image(), "PNG"), text)


def write_unicode_twins(folder: Path) -> None:
    for form in ("NFC", "NFD"):
        write_sample(
            folder,
            unicodedata.normalize(form, f"caf{E_ACUTE}.png"),
            encode_image(noise_image(), "PNG"),
        )


def write_same_stem(folder: Path) -> None:
    write_sample(folder, "a.png", encode_image(noise_image(), "PNG"))
    write_sample(folder, "a.jpg", encode_image(noise_image(), "JPEG"))


def animation_settings() -> dict[str, object]:
    return {
        "save_all": True,
        "append_images": [noise_image((96, 64)).rotate(90 * turn) for turn in (1, 2)],
    }


def float_tiff() -> bytes:
    return encode_image(
        Image.fromarray(np.random.default_rng(1).random((64, 96), np.float32)), "TIFF"
    )


IGNORED_CASES = ("hidden file", "svg by name", "files of the system")
BROKEN_EXIF = b"Exif\0\0II*\0\xff\xff\xff\x7f"
PLAIN_PNG = encode_image(noise_image(), "PNG")

BAD_FILE_CASES = (
    BadFileCase(
        "truncated jpeg",
        image_writer("x.jpg", lambda: encode_image(noise_image(), "JPEG")[:-900]),
        decode="damaged",
    ),
    BadFileCase(
        "truncated png",
        image_writer("x.png", lambda: encode_image(noise_image(), "PNG")[:-900]),
        decode="damaged",
    ),
    BadFileCase(
        "bit-flipped png",
        image_writer("x.png", lambda: flip_byte(encode_image(noise_image(), "PNG"), 900)),
        decode="damaged",
    ),
    BadFileCase(
        "damaged webp",
        image_writer("x.webp", lambda: encode_image(noise_image(), "WEBP")[:200]),
        reason="damaged",
    ),
    BadFileCase("zero bytes", image_writer("x.jpg", lambda: b""), reason="empty_file"),
    BadFileCase(
        "html as jpg",
        image_writer("x.jpg", lambda: b"<html><body>404</body></html>"),
        reason="not_an_image",
    ),
    BadFileCase(
        "eps as png",
        image_writer("x.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        reason="not_an_image",
    ),
    BadFileCase(
        "header cut off",
        image_writer("x.jpg", lambda: encode_image(noise_image(), "JPEG")[:20]),
        reason="not_an_image",
    ),
    BadFileCase(
        "heic by name",
        image_writer("x.heic", lambda: b"\0\0\0\x18ftypheic" + b"\0" * 64),
        reason="not_an_image",
    ),
    BadFileCase(
        "bomb of 144 megapixels",
        image_writer("x.png", lambda: png_header(12000, 12000)),
        reason="too_many_pixels",
    ),
    BadFileCase(
        "bomb of 400 megapixels",
        image_writer("x.png", lambda: png_header(20000, 20000)),
        reason="too_many_pixels",
    ),
    BadFileCase(
        "header without pixels", image_writer("x.png", lambda: png_header(96, 64)), decode="damaged"
    ),
    BadFileCase(
        "animated gif",
        image_writer(
            "x.gif", lambda: encode_image(noise_image(mode="P"), "GIF", **animation_settings())
        ),
        note="with animation",
    ),
    BadFileCase(
        "animated webp",
        image_writer("x.webp", lambda: encode_image(noise_image(), "WEBP", **animation_settings())),
        note="with animation",
    ),
    BadFileCase(
        "animated png",
        image_writer("x.png", lambda: encode_image(noise_image(), "PNG", **animation_settings())),
        note="with animation",
    ),
    BadFileCase(
        "cmyk jpeg",
        image_writer("x.jpg", lambda: encode_image(noise_image(mode="CMYK"), "JPEG")),
        note="CMYK",
    ),
    BadFileCase("float tiff", image_writer("x.tif", float_tiff), reason="unsupported_pixels"),
    BadFileCase(
        "transparency",
        image_writer("x.png", lambda: encode_image(noise_image(mode="RGBA"), "PNG")),
        note="transparency",
    ),
    BadFileCase("grey", image_writer("x.png", lambda: encode_image(noise_image(mode="L"), "PNG"))),
    BadFileCase(
        "grey and alpha",
        image_writer("x.png", lambda: encode_image(noise_image(mode="LA"), "PNG")),
        note="transparency",
    ),
    BadFileCase(
        "one bit", image_writer("x.png", lambda: encode_image(noise_image(mode="1"), "PNG"))
    ),
    BadFileCase(
        "palette", image_writer("x.png", lambda: encode_image(noise_image(mode="P"), "PNG"))
    ),
    BadFileCase(
        "broken exif",
        image_writer("x.jpg", lambda: encode_image(noise_image(), "JPEG", exif=BROKEN_EXIF)),
    ),
    BadFileCase(
        "broken icc",
        image_writer(
            "x.png", lambda: encode_image(noise_image(), "PNG", icc_profile=b"not a profile")
        ),
    ),
    BadFileCase(
        "one by n",
        image_writer("x.png", lambda: encode_image(noise_image((1, 300)), "PNG")),
        reason="aspect_ratio",
    ),
    BadFileCase(
        "one by one",
        image_writer("x.png", lambda: encode_image(noise_image((1, 1)), "PNG")),
        reason="too_small",
    ),
    BadFileCase(
        "emoji, quotes, newline", image_writer("a \U0001f600 'q' \"d\"\nb.png", lambda: PLAIN_PNG)
    ),
    BadFileCase(
        "name not utf-8",
        lambda folder: write_sample(folder, b"\xff.png", PLAIN_PNG),
        reason="file_name",
    ),
    BadFileCase("nfc and nfd twins", write_unicode_twins, reason="name_twins"),
    BadFileCase("same stem twice", write_same_stem),
    BadFileCase("no caption", caption_writer(None), reason="caption_missing"),
    BadFileCase("blank caption", caption_writer(b" \r\n\t\n"), reason="caption_missing"),
    BadFileCase(
        "latin-1 caption", caption_writer("caf\u00e9".encode("latin-1")), reason="caption_encoding"
    ),
    BadFileCase(
        "utf-16 caption", caption_writer("a cat".encode("utf-16")), reason="caption_encoding"
    ),
    BadFileCase(
        "utf-16 caption without mark",
        caption_writer("a cat".encode("utf-16-le")),
        reason="caption_encoding",
    ),
    BadFileCase("caption with mark and crlf", caption_writer(b"\xef\xbb\xbfone\r\ntwo\r\n")),
    BadFileCase(
        "dangling link",
        lambda folder: (folder / "x.png").symlink_to(folder / "gone.png"),
        reason="unreadable",
    ),
    BadFileCase("named pipe", lambda folder: os.mkfifo(folder / "x.png"), reason="unreadable"),
    BadFileCase(
        "link to itself", lambda folder: (folder / "x.png").symlink_to("x.png"), reason="unreadable"
    ),
    BadFileCase(
        "svg by name",
        lambda folder: write_sample(folder, "x.svg", b"<svg/>", None),
        note="cannot be used: 1 .svg",
    ),
    BadFileCase(
        "files of the system", lambda folder: write_sample(folder, "Thumbs.db", b"\xd0\xcf", None)
    ),
    BadFileCase("hidden file", lambda folder: write_sample(folder, "._x.png", b"\0" * 40)),
)
