"""The measured part of docs/densities.md, written between two marks from results/density.json."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.nano.markdown_tables import (
    PART_COLUMNS,
    Column,
    format_number,
    format_seeds,
    render_grid,
)
from benchmarks.nano.measured_part import replace_measured_part
from benchmarks.nano.result_tables import TableData
from benchmarks.nano.verdicts import T_CRITICAL

from simpletuner.config.schema import FlowOptions

COMMAND = "python -m benchmarks.nano"
# part -> the measure by which pictures judge, and what it is called
SCORE_MEASURES = {
    "lesson": ("zorbo_all", "zorbos drawn as said"),
    "scratch": ("shapes_all", "shapes drawn as said"),
}


def update_page(text: str, density: TableData) -> str:
    """Return the page with its measured part renewed. Raises ValueError without the marks."""
    return replace_measured_part(text, COMMAND, render_measured_section(density))


def render_measured_section(density: TableData) -> str:
    size = density["size"]
    steps = {
        "lesson": f"{size['lesson_steps']} steps of {size['lesson_batch']}",
        "scratch": f"{size['scratch_steps']} steps of {size['scratch_batch']}",
    }
    told = []
    for part in density["parts"]:
        name, title = part["name"], part["title"]
        told += [f"**{title[0].upper()}{title[1:]}**, {steps[name]}, base {density['base']}:", ""]
        if not any(row["measures"] for row in part["rows"]):
            told += ["not measured yet.", ""]
            continue
        told += [render_short_table(part), "", render_conclusion(part), ""]
    return "\n".join(told).rstrip()


def render_short_table(part: TableData) -> str:
    measure, heading = SCORE_MEASURES[part["name"]]
    columns = (*PART_COLUMNS[part["name"]][:2], Column(f"{heading}, %", measure, 1, 100.0))
    rows = []
    for row in part["rows"]:
        found = [
            row["against" if one.is_difference else "measures"].get(one.measure) for one in columns
        ]
        cells = [format_number(value, one) if value else "-" for value, one in zip(found, columns)]
        rows.append([row["label"], format_seeds(row), *cells])
    return render_grid(["", "seeds", *(one.heading for one in columns)], rows)


def render_conclusion(part: TableData) -> str:
    """Who is best by each judge, and by how much the default falls short of it."""
    measure, heading = SCORE_MEASURES[part["name"]]
    rows = [row for row in part["rows"] if row["measures"]]
    lowest = min(rows, key=lambda row: row["measures"]["held_out"]["mean"])
    said = [
        f"Lowest held-out loss: {lowest['label']}{describe_distance(lowest, 'held_out', part['reference'])}."
    ]
    scored = [row for row in rows if measure in row["measures"]]
    if len({row["measures"][measure]["mean"] for row in scored}) == 1 and len(scored) > 1:
        said.append(f"By {heading} they are equal.")
    elif scored:
        highest = max(scored, key=lambda row: row["measures"][measure]["mean"])
        said.append(
            f"Most {heading}: {highest['label']}{describe_distance(highest, measure, part['reference'])}."
        )
    said.append(f"The default is {FlowOptions().chroma_sigma_density}.")
    return " ".join(said)


def describe_distance(row: TableData, measure: str, reference: str) -> str:
    found: Mapping[str, float | None] | None = row["against"].get(measure)
    if row["label"] == reference or found is None:
        return ""
    mean, se = found["mean"], found["se"]
    if mean is None or se is None:
        return f"; one seed says nothing of how far from {reference}"
    away = abs(mean) / se if se else 0.0
    clear = away >= T_CRITICAL[row["finished"]]
    return f", {away:.1f} standard errors from {reference}: {'clear' if clear else 'not clear'} with these seeds"  # noqa: E501
