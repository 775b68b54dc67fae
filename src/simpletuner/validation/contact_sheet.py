"""Contact sheets: tables of images with labels, as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from simpletuner.image_decoding import UndecodableImage, decoder_errors
from simpletuner.validation.fonts import Font, renderable_text
from simpletuner.validation.validation_images import save_png

PAPER_COLOUR = "#ffffff"
TEXT_COLOUR = "#1c1c1c"
DETAIL_COLOUR = "#6b6b6b"
MISSING_COLOUR = "#ececec"
GAP_PX = 8
FONT_PX = 14
LABEL_WIDTH_PX = 176
MAX_COLUMNS = 8
MAX_ROWS = 64


@dataclass(frozen=True)
class SheetRow:
    """One row. label: its name. detail: smaller text below. cells: column -> image file."""

    label: str
    detail: str
    cells: Mapping[Any, Path]


def write_contact_sheet(rows: Sequence[SheetRow], columns: Mapping[Any, str], path: Path) -> Path:
    """Write a table of images as PNG, and return its path.

    columns: the key in the cells -> the title. A missing image is a grey box. Rows beyond MAX_ROWS
    are left out.
    """
    rows = rows[:MAX_ROWS]
    cell = 256 if len(rows) <= 16 else 128
    side, head = LABEL_WIDTH_PX, FONT_PX + 2 * GAP_PX
    width = side + len(columns) * (cell + GAP_PX) + GAP_PX
    thumbnails = [
        {column: _thumbnail(row.cells[column], cell) for column in columns if column in row.cells}
        for row in rows
    ]
    heights = [
        max((image.height for image in cells.values()), default=cell) for cells in thumbnails
    ]
    sheet = Image.new("RGB", (width, head + sum(heights) + GAP_PX * (len(rows) + 1)), PAPER_COLOUR)
    pen = ImageDraw.Draw(sheet)
    for index, title in enumerate(columns.values()):
        left = side + GAP_PX + index * (cell + GAP_PX)
        title, font = renderable_text(title, FONT_PX)
        pen.text((left, GAP_PX), _truncate(title, font, cell), TEXT_COLOUR, font)
    top = head
    for row, cells, height in zip(rows, thumbnails, heights, strict=True):
        label, font = renderable_text(row.label, FONT_PX)
        pen.text((GAP_PX, top), _truncate(label, font, side - GAP_PX), TEXT_COLOUR, font)
        detail, small = renderable_text(row.detail, FONT_PX - 3)
        lines = _wrap(detail, small, side - GAP_PX, max(1, (height - 2 * FONT_PX) // FONT_PX))
        pen.multiline_text((GAP_PX, top + FONT_PX + 8), lines, DETAIL_COLOUR, small, spacing=3)
        for index, column in enumerate(columns):
            corner = (side + GAP_PX + index * (cell + GAP_PX), top)
            if column in cells:
                sheet.paste(cells[column], corner)
            else:
                right, bottom = corner[0] + cell - 1, corner[1] + height - 1
                pen.rectangle((*corner, right, bottom), MISSING_COLOUR)
        top += height + GAP_PX
    save_png(sheet, path)
    return path


def _thumbnail(path: Path, cell: int) -> Image.Image:
    """Return the image in a square of `cell` pixels; grey where the file cannot be decoded."""
    try:
        with decoder_errors(), Image.open(path) as image:
            return ImageOps.contain(image.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)
    except UndecodableImage:
        return Image.new("RGB", (cell, cell), MISSING_COLOUR)


def _truncate(text: str, font: Font, width: int) -> str:
    """Return one line of at most `width` pixels, shortened with dots where it is longer."""
    text = " ".join(text.split())[:200]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, font: Font, width: int, max_lines: int) -> str:
    """Break the text between words into at most max_lines lines; dots mark what does not fit."""
    lines: list[str] = []
    words = text.split()[:80]
    while words and len(lines) < max_lines:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        is_last = len(lines) + 1 == max_lines
        lines.append(_truncate(" ".join(words if is_last else words[:count]), font, width))
        words = words[count:]
    return "\n".join(lines)
