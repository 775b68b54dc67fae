"""Contact sheets: many pictures on one, with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from simpletuner.validation.fonts import Font, renderable_text
from simpletuner.validation.validation_images import save_png

PAPER_COLOUR, TEXT_COLOUR, DETAIL_COLOUR, MISSING_COLOUR = (
    "#ffffff",
    "#1c1c1c",
    "#6b6b6b",
    "#ececec",
)
GAP_PX, FONT_PX = 8, 14
MAX_COLUMNS, MAX_ROWS = 8, 64


@dataclass(frozen=True)
class SheetRow:
    """label: the row's name; detail: smaller, below it. cells: column -> picture file."""

    label: str
    detail: str
    cells: Mapping[Any, Path]


def write_contact_sheet(rows: Sequence[SheetRow], columns: Mapping[Any, str], path: Path) -> Path:
    """A table of pictures as PNG. columns: name, as in the cells, -> title. Missing pictures stay grey."""
    rows = rows[:MAX_ROWS]
    cell = 256 if len(rows) <= 16 else 128
    side, head = 176, FONT_PX + 2 * GAP_PX
    width = side + len(columns) * (cell + GAP_PX) + GAP_PX
    drawn = [
        {column: _thumbnail(row.cells[column], cell) for column in columns if column in row.cells}
        for row in rows
    ]
    heights = [max((image.height for image in cells.values()), default=cell) for cells in drawn]
    sheet = Image.new("RGB", (width, head + sum(heights) + GAP_PX * (len(rows) + 1)), PAPER_COLOUR)
    pen = ImageDraw.Draw(sheet)
    for index, title in enumerate(columns.values()):
        left = side + GAP_PX + index * (cell + GAP_PX)
        title, font = renderable_text(title, FONT_PX)
        pen.text((left, GAP_PX), _truncate(title, font, cell), TEXT_COLOUR, font)
    top = head
    for row, cells, height in zip(rows, drawn, heights, strict=True):
        label, font = renderable_text(row.label, FONT_PX)
        pen.text((GAP_PX, top), _truncate(label, font, side - GAP_PX), TEXT_COLOUR, font)
        detail, small = renderable_text(row.detail, FONT_PX - 3)
        lines = _wrap(detail, small, side - GAP_PX, max(1, (height - 2 * FONT_PX) // FONT_PX))
        pen.multiline_text((GAP_PX, top + FONT_PX + 8), lines, DETAIL_COLOUR, small, spacing=3)
        for index, column in enumerate(columns):
            place = (side + GAP_PX + index * (cell + GAP_PX), top)
            if column in cells:
                sheet.paste(cells[column], place)
            else:
                pen.rectangle((*place, place[0] + cell - 1, place[1] + height - 1), MISSING_COLOUR)
        top += height + GAP_PX
    save_png(sheet, path)
    return path


def _thumbnail(picture: Path, cell: int) -> Image.Image:
    with Image.open(picture) as image:
        return ImageOps.contain(image.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)


def _truncate(text: str, font: Font, width: int) -> str:
    """One line no wider than that, shortened with dots."""
    text = " ".join(text.split())[:200]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, font: Font, width: int, most: int) -> str:
    """At most that many lines broken between words; what does not fit is cut with dots."""
    lines: list[str] = []
    words = text.split()[:80]
    while words and len(lines) < most:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        whole = len(lines) + 1 == most
        lines.append(_truncate(" ".join(words if whole else words[:count]), font, width))
        words = words[count:]
    return "\n".join(lines)
