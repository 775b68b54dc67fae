"""Labels in the letters of the prompt: a font of this computer that has them all, or the nearest spelling."""

from __future__ import annotations

import unicodedata
from functools import cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pillow's own font holds English alone. These are looked up by name where the system keeps its fonts.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "segoeui.ttf",
    "arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "Lohit-Devanagari.ttf",
    "Nirmala.ttc",
    "Nirmala.ttf",
    "Kohinoor.ttc",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "NotoNaskhArabic-Regular.ttf",
    "NotoSansBengali-Regular.ttf",
    "NotoSansThai-Regular.ttf",
)


def renderable_text(text: str, size_px: int) -> tuple[str, Font]:
    """The text and a font for it. Where no font has every letter: without accents, "?" for what is left."""
    text = unicodedata.normalize("NFC", text)
    for font in _load_fonts(size_px):
        if all(_has_glyph(font, letter) for letter in set(text)):
            return text, font
    font = _load_fonts(size_px)[0]
    plain = [
        letter
        for letter in unicodedata.normalize("NFKD", text)
        if not unicodedata.combining(letter)
    ]
    return "".join(letter if _has_glyph(font, letter) else "?" for letter in plain), font


@cache
def _load_fonts(size_px: int) -> tuple[Font, ...]:
    found = [ImageFont.load_default(size=size_px)]
    for name in SYSTEM_FONTS:
        try:
            found.append(ImageFont.truetype(name, size_px))
        except OSError:
            continue  # not on this computer
    return tuple(found)


@cache
def _has_glyph(font: Font, letter: str) -> bool:
    """Fonts draw one and the same box for every letter that they lack; the last code point has none."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffe"))
