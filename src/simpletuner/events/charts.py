"""Line charts as inline SVG: no script, colours from the style sheet, values as tooltips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 34
MAX_POINTS = 700
Point = tuple[float, float]


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart. points: (x, y). style: a class of the style sheet.

    errors: half the height of each point's error bar. markers: a dot with a tooltip at each point.
    highlighted_index: index of a point with a ring around it.
    """

    points: Sequence[Point]
    name: str = ""
    style: str = "line"
    errors: Sequence[float] = ()
    markers: bool = False
    highlighted_index: int | None = None


def render_line_chart(
    title: str, lines: Sequence[ChartLine], x_name: str = "step", zero: bool = False
) -> str:
    """Return an SVG figure; a line has gaps where y is not finite.

    zero: the axis includes y = 0 and marks it.
    """
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return ""
    x0, x1 = _axis_range([x for line in lines for x, _ in line.points], pad=0.0)
    y0, y1 = _axis_range(
        [y for line in lines for y in _y_values(line)] + ([0.0] if zero else []), pad=0.06
    )

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in axis_ticks(y0, y1, 5):
        style = "zero" if zero and tick == 0 else "grid"
        y = f"{py(tick):.1f}"
        parts.append(f'<line class="{style}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        place = f'x="{LEFT - 8}" y="{py(tick) + 4:.1f}"'
        parts.append(f'<text class="tick" {place} text-anchor="end">{tick:.6g}</text>')
    for tick in axis_ticks(x0, x1, 7):
        place = f'x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 17}"'
        parts.append(f'<text class="tick" {place} text-anchor="middle">{tick:.6g}</text>')
    place = f'x="{WIDTH - RIGHT}" y="{HEIGHT - 3}"'
    parts.append(f'<text class="tick" {place} text-anchor="end">{escape(x_name)}</text>')
    for line in lines:
        parts += _render_line(line, px, py)
    keys = "".join(
        f'<span class="{line.style}">{escape(line.name)}</span>' for line in lines if line.name
    )
    legend = f'<span class="legend">{keys}</span>' if keys else ""
    label = f'role="img" aria-label="{escape(title)}"'
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}{legend}</figcaption>{svg}</figure>"


def axis_ticks(low: float, high: float, about: int) -> list[float]:
    """Return round values in [low, high], 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(
        factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * 0.999
    )
    first = math.ceil(low / apart - 1e-9)
    return [round(n * apart, 12) for n in range(first, math.floor(high / apart + 1e-9) + 1)]


def downsample_points(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Return the lowest and highest point of each of limit / 2 pieces, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    piece = math.ceil(2 * len(points) / limit)
    thinned: list[Point] = []
    for start in range(0, len(points), piece):
        part = points[start : start + piece]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        thinned += sorted(ends)
    return thinned


def _render_line(
    line: ChartLine, px: Callable[[float], float], py: Callable[[float], float]
) -> list[str]:
    parts, path, pen = [], [], "M"
    for x, y in line.points if line.markers else downsample_points(line.points):
        if not math.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{px(x):.1f} {py(y):.1f}")
        pen = "L"
    parts.append(f'<path class="{line.style}" d="{"".join(path)}"/>')
    for (x, y), error in zip(line.points, line.errors, strict=False):
        if math.isfinite(error) and math.isfinite(y):
            ends = f'y1="{py(y - error):.1f}" y2="{py(y + error):.1f}"'
            bar = f'x1="{px(x):.1f}" x2="{px(x):.1f}" {ends}'
            parts.append(f'<line class="{line.style}" {bar}/>')
    for number, (x, y) in enumerate(line.points if line.markers else ()):
        if not math.isfinite(y):
            continue
        at = f'cx="{px(x):.1f}" cy="{py(y):.1f}"'
        if number == line.highlighted_index:
            parts.append(f'<circle class="best" {at} r="7"/>')
        spread = f" ± {line.errors[number]:.4g}" if number < len(line.errors) else ""
        tip = escape(f"{line.name} {x:.6g}: {y:.5g}{spread}".strip())
        parts.append(f'<circle class="{line.style}" {at} r="3"><title>{tip}</title></circle>')
    return parts


def _y_values(line: ChartLine) -> list[float]:
    if not line.errors:
        return [y for _, y in line.points]
    return [
        y + sign * e
        for (_, y), e in zip(line.points, line.errors, strict=False)
        for sign in (-1, 1)
    ]


def _axis_range(values: Sequence[float], pad: float) -> Point:
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    if high == low:
        margin = abs(high) * 0.1 or 1.0
        return low - margin, high + margin
    return low - pad * (high - low), high + pad * (high - low)
