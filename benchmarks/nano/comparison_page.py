"""The measured parts of docs/methods.md and docs/preservation.md, from results/*.json."""

from __future__ import annotations

from benchmarks.nano.markdown_tables import (
    EMPTY_CELL,
    Column,
    format_number,
    format_seeds,
    render_grid,
)
from benchmarks.nano.measured_part import replace_measured_part
from benchmarks.nano.result_tables import TableData
from benchmarks.nano.verdicts import RULE_IN_WORDS, is_clear, verdict_in_words

COLUMNS = (
    Column("held-out loss, 1/1000", "held_out", 1, 1000.0, True),
    Column("learnt, points", "zorbo_zorbo", 1, 100.0, True),
    Column("base's score lost, points", "lost_all", 1, 100.0, True),
)
NOT_MEASURED = "**Not measured yet**: no cell of this table is finished."
ALT_TEXT = "differences from the first row of each part: held-out loss, learnt, lost"


def update_page(text: str, table: TableData, figure: str) -> str:
    """Return the page with its measured part renewed.

    figure: file name of the table's plot, next to the page. Raises ValueError when the marks are
    missing.
    """
    command = f"python -m benchmarks.nano --only {table['table']}"
    return replace_measured_part(text, command, render_measured_section(table, figure))


def is_measured(table: TableData) -> bool:
    """Return whether any row of a table has a finished cell."""
    return any(row["measures"] for part in table["parts"] for row in part["rows"])


def render_measured_section(table: TableData, figure: str) -> str:
    if not is_measured(table):
        return NOT_MEASURED
    size = table["size"]
    lines = [
        f"Runs of {size['lesson_steps']} steps of {size['lesson_batch']} where a row says nothing else, "
        f"base {table['base']}, {table['date']}. Shown is the difference from the first row, seed by seed, "
        f"with its standard error; for the first row the value itself. {RULE_IN_WORDS}",
        "",
        f"![{ALT_TEXT}]({figure})",
    ]
    for part in table["parts"]:
        title = part["title"]
        lines += [
            "",
            f"**{title[0].upper()}{title[1:]}**",
            "",
            _render_part(part),
            "",
            _conclude(part),
        ]
    return "\n".join(lines)


def _render_part(part: TableData) -> str:
    rows = [
        [
            row["label"],
            format_seeds(row),
            *(_format_cell(row, column, row is part["rows"][0]) for column in COLUMNS),
            verdict_in_words(row),
        ]
        for row in part["rows"]
    ]
    return render_grid(["", "seeds", *(column.heading for column in COLUMNS), "in words"], rows)


def _format_cell(row: TableData, column: Column, is_first: bool) -> str:
    if is_first or not column.is_difference:
        value = row["measures"].get(column.measure)
        plain = Column(column.heading, column.measure, column.digits, column.scale)
        return format_number(value, plain) if value else EMPTY_CELL
    difference = row["against"].get(column.measure)
    return format_number(difference, column) if difference else EMPTY_CELL


def _conclude(part: TableData) -> str:
    """Return which rows are clearly better in a measure and clearly worse in none."""
    reference, *others = part["rows"]
    compared = [row for row in others if verdict_in_words(row)]
    if not compared:
        return f"Too few seeds are finished to compare with {reference['label']}."
    better = [row["label"] for row in compared if _is_better(row)]
    if not better:
        return f"No row is clearly better than {reference['label']}."
    labels = ", ".join(better)
    return f"Better than {reference['label']} in one measure and worse in none, clearly: {labels}."


def _is_better(row: TableData) -> bool:
    signs = {"held_out": -1, "zorbo_zorbo": 1, "lost_all": -1}  # of a change for the better
    clear = [
        sign * row["against"][measure]["mean"] > 0
        for measure, sign in signs.items()
        if is_clear(row, measure)
    ]
    return bool(clear) and all(clear)
