"""The plots of docs/methods.md and docs/preservation.md: what each row changes against the first of its part.

Three columns: held-out loss, what was learnt and what of the base was lost. A dot is the mean of the
differences, paired by seed, and a bar its 95 % interval; a row whose bar does not reach 0 differs. Rows
without a difference (one seed, or none) have no dot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.nano.result_tables import TableData
from benchmarks.nano.verdicts import T_CRITICAL

from simpletuner.events.charts import axis_ticks

LABEL_WIDTH, COLUMN, GAP, ROW, TITLE, HEADER, FOOTER, MARGIN = 330, 200, 26, 20, 30, 26, 22, 12
BETTER, WORSE, SAME = "#2b8a3e", "#c92a2a", "#868e96"


@dataclass(frozen=True)
class Column:
    """A measure. factor: of the shown unit. lower_is_better: which side of 0 is green."""

    measure: str
    title: str
    factor: float
    lower_is_better: bool


COLUMNS = (
    Column("held_out", "held-out loss, 1/1000", 1000.0, True),
    Column("zorbo_zorbo", "learnt, points", 100.0, False),
    Column("lost_all", "base's score lost, points", 100.0, True),
)


@dataclass(frozen=True)
class Dot:
    """A difference and half of its bar, in the column's unit."""

    value: float
    error: float

    def colour(self, lower_is_better: bool) -> str:
        if abs(self.value) <= self.error:
            return SAME
        return BETTER if (self.value < 0) == lower_is_better else WORSE


def read_dot(row: TableData, column: Column) -> Dot | None:
    """Return the row's difference in a column; None where there is none with an error."""
    difference = row["against"].get(column.measure)
    if not difference or difference["se"] is None:
        return None
    errors = T_CRITICAL[row["finished"]]
    return Dot(column.factor * difference["mean"], errors * column.factor * difference["se"])


def axis_limits(rows: Sequence[TableData], column: Column) -> tuple[float, float]:
    """Return the range of a column over all rows, with 0 in it."""
    dots = [dot for row in rows if (dot := read_dot(row, column)) is not None]
    low = min([0.0, *(dot.value - dot.error for dot in dots)])
    high = max([0.0, *(dot.value + dot.error for dot in dots)])
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def render_figure(table: TableData) -> str:
    """Return the SVG of a table, its parts below each other on the same axes."""
    rows = [row for part in table["parts"] for row in part["rows"]]
    limits = [axis_limits(rows, column) for column in COLUMNS]
    body, y = [], float(MARGIN)
    for number, column in enumerate(COLUMNS):
        middle = _left(number) + COLUMN / 2
        body.append(_text(middle, y + 12, column.title, anchor="middle", bold=True))
    y += HEADER
    for part in table["parts"]:
        reference, *others = part["rows"]
        title = f"{part['title']}, against: {reference['label']}"
        body.append(_text(MARGIN, y + 18, title, bold=True))
        y += TITLE
        body += [_render_grid(y, len(others), number, limit) for number, limit in enumerate(limits)]
        for row in others:
            body.append(_render_row(row, y, limits))
            y += ROW
        y += FOOTER
    width = _left(len(COLUMNS)) - GAP + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y:.0f}" '
        f'font-family="sans-serif" font-size="12" fill="#343a40">'
        f'<rect width="{width}" height="{y:.0f}" fill="white"/>{"".join(body)}</svg>\n'
    )


def _left(number: int) -> int:
    return LABEL_WIDTH + number * (COLUMN + GAP)


def _x(value: float, number: int, limits: tuple[float, float]) -> float:
    low, high = limits
    return _left(number) + (value - low) / (high - low) * COLUMN


def _render_grid(top: float, rows: int, number: int, limits: tuple[float, float]) -> str:
    """Return the lines of a column behind the rows of a part, with their values below."""
    bottom, parts = top + rows * ROW, []
    for tick in axis_ticks(*limits, 5):
        x = _x(tick, number, limits)
        colour = "#868e96" if tick == 0 else "#e3e6ea"
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{colour}"/>'
        )
        parts.append(_text(x, bottom + 14, f"{tick:g}", anchor="middle"))
    return "".join(parts)


def _render_row(row: TableData, top: float, limits: Sequence[tuple[float, float]]) -> str:
    middle = top + ROW / 2
    parts = [_text(LABEL_WIDTH - 12, middle + 4, row["label"], anchor="end")]
    for number, column in enumerate(COLUMNS):
        dot = read_dot(row, column)
        if dot is None:
            continue
        colour = dot.colour(column.lower_is_better)
        low, centre, high = (
            _x(value, number, limits[number])
            for value in (dot.value - dot.error, dot.value, dot.value + dot.error)
        )
        parts.append(
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="{colour}" '
            'stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{centre:.1f}" cy="{middle}" r="4" fill="{colour}"/>')
    return "".join(parts)


def _text(x: float, y: float, words: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
