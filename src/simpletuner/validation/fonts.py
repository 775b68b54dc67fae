"""Fonts for labels in any script: one of this computer's fonts, or the nearest Latin spelling."""

from __future__ import annotations

import unicodedata
from functools import cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pillow's own font has only Latin letters. These are looked up in the system's font folders.
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
    """Return the text and a font that has all of its letters.

    Where no font has them all, accents are removed and each remaining letter becomes "?".
    """
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
    fonts: list[Font] = [ImageFont.load_default(size=size_px)]
    for name in SYSTEM_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size_px))
        except OSError:
            continue  # this computer does not have it
    return tuple(fonts)


@cache
def _has_glyph(font: Font, letter: str) -> bool:
    """Return whether the font has the letter.

    A font draws the same box for every letter that it lacks. No font has U+10FFFE, so its image is
    that box.
    """
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffe"))
