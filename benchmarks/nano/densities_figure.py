"""The picture of docs/densities.md: the densities, and the held-out loss of each by sigma."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
from benchmarks.nano.experiments import DENSITIES
from benchmarks.nano.markdown_tables import format_seeds, sigma_names
from benchmarks.nano.result_tables import TableData

from simpletuner.config.schema import FlowOptions
from simpletuner.events.charts import axis_ticks
from simpletuner.flow.densities import quantile_function

COLOURS = dict(zip(DENSITIES, ("#1f5fbf", "#d9480f", "#868e96", "#2b8a3e", "#9c36b5")))
WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM, LEGEND = 720, 250, 62, 20, 34, 36, 34
BINS, SAMPLE_COUNT = 40, 200_000
Point = tuple[float, float, float]  # sigma, value, half of its error bar


@dataclass(frozen=True)
class Curve:
    name: str
    points: Sequence[Point]
    error_bars: bool = False


def density_curve(name: str) -> Curve:
    """Share of the samples by sigma, where 1 is uniform, from evenly spaced quantiles."""
    options = FlowOptions.model_validate({"chroma_sigma_density": name})
    sigma = quantile_function(options)(
        (torch.arange(SAMPLE_COUNT, dtype=torch.float64) + 0.5) / SAMPLE_COUNT
    )
    shares = torch.histc(sigma.float(), BINS, 0.0, 1.0) * BINS / SAMPLE_COUNT
    return Curve(
        name, [((index + 0.5) / BINS, share, 0.0) for index, share in enumerate(shares.tolist())]
    )


def change_curves(part: TableData) -> list[Curve]:
    """Held-out loss by sigma against the first row's, percent, paired by seed."""
    names = sigma_names(part)
    first, *others = part["rows"]
    if not first["measures"]:
        return []
    curves = [Curve(first["label"], [(parse_sigma(name), 0.0, 0.0) for name in names])]
    for row in others:
        points = [
            (parse_sigma(name), 100 * (found["mean"] - 1), 100 * (found["se"] or 0.0))
            for name in names
            if (found := row["against"].get(f"{name}_ratio")) is not None
        ]
        curves += [Curve(row["label"], points, error_bars=True)] if points else []
    return curves if len(curves) > 1 else []


def parse_sigma(name: str) -> float:
    return float(name.removeprefix("sigma_"))


def axis_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Range of the axis. The literal remap's hole must not press all others flat: it gets as much
    room.
    """
    known = {literal: [y + sign * e for curve in curves if (curve.name == "quadratic-literal") == literal
                       for _, y, e in curve.points for sign in (-1, 1)]
             for literal in (True, False)}  # fmt: skip
    low, high = min(known[False], default=0.0), max(known[False], default=1.0)
    span = high - low
    low = max(min([low, *known[True]]), low - span)
    high = min(max([high, *known[True]]), high + span)
    margin = 0.12 * (high - low) or 1.0
    return low - margin, high + margin


def render_panel(
    title: str, curves: Sequence[Curve], top: float, low: float, high: float, clip: str
) -> str:
    def px(x: float) -> float:
        return LEFT + x * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return top + TOP + (high - y) / (high - low) * (PANEL - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="{top + 18}" font-weight="bold">{escape(title)}</text>']
    for value in axis_ticks(low, high, 5):
        y = f"{py(value):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#e3e6ea"/>')
        parts.append(
            f'<text x="{LEFT - 7}" y="{py(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in axis_ticks(0.0, 1.0, 10):
        y = top + PANEL - BOTTOM + 16
        parts.append(f'<text x="{px(value):.1f}" y="{y}" text-anchor="middle">{value:g}</text>')
    inside = []
    for curve in curves:
        colour = COLOURS[curve.name]
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in curve.points)
        inside.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, error in curve.points if curve.error_bars else ():
            bar = f'x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(y - error):.1f}" y2="{py(y + error):.1f}"'
            inside.append(f'<line {bar} stroke="{colour}"/>')
            inside.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6" fill="{colour}"/>')
    box = f'x="{LEFT}" y="{top + TOP:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{PANEL - TOP - BOTTOM}"'
    parts.append(f'<clipPath id="{clip}"><rect {box}/></clipPath>')
    parts.append(f'<g clip-path="url(#{clip})">{"".join(inside)}</g>')
    return "".join(parts)


def render_legend(top: float) -> str:
    parts, x = [], float(LEFT)
    for name, colour in COLOURS.items():
        y = top + 16
        parts.append(
            f'<line x1="{x}" x2="{x + 18}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{x + 24}" y="{y + 4}">{name}</text>')
        x += 46 + 6.6 * len(name)
    return "".join(parts)


def render_figure(density: TableData) -> str:
    """SVG: what is trained, then one panel a part, of those that have something to compare."""
    panels = [("share of the samples by sigma (uniform is 1)", [density_curve(name) for name in DENSITIES],
               (0.0, 2.6))]  # fmt: skip
    for part in density["parts"]:
        curves = change_curves(part)
        if curves:
            seeds = sorted({format_seeds(row) for row in part["rows"] if row["measures"]})
            title = (f"held-out loss by sigma against {part['reference']}, %: {part['title']}; "
                     f"{' to '.join(seeds)} seeds")  # fmt: skip
            panels.append((title, curves, axis_limits(curves)))
    height = LEGEND + PANEL * len(panels)
    body = [render_legend(0.0)]
    for index, (title, curves, (low, high)) in enumerate(panels):
        body.append(render_panel(title, curves, LEGEND + PANEL * index, low, high, f"panel{index}"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#343a40"><rect width="{WIDTH}" height="{height}" fill="white" stroke="none"/>'
        f"{''.join(body)}</svg>\n"
    )
