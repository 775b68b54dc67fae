"""Tables as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.nano.exposure import EXPOSURE_PROMPTS, SAMPLING_STEPS
from benchmarks.nano.methods import METHOD_NOTES, METHOD_PART_NAMES
from benchmarks.nano.preservation import NOTE as PRESERVATION_NOTE
from benchmarks.nano.result_tables import TableData
from benchmarks.nano.verdicts import verdict_in_words

EMPTY_CELL = "-"


@dataclass(frozen=True)
class Column:
    """heading; measure: a name of result.measures; digits; scale: what it is multiplied with;
    against: the paired difference from the first row (its ratio by a measure ending in _ratio)
    instead of the value."""

    heading: str
    measure: str
    digits: int = 3
    scale: float = 1.0
    is_difference: bool = False


def percent_column(heading: str, measure: str) -> Column:
    """In percent."""
    return Column(f"{heading} %", measure, 1, 100.0)


HELD_OUT_COLUMNS = (
    Column("held-out loss", "held_out", 4),
    Column("against the first row", "held_out", 4, 1.0, True),
)
ZORBO_COLUMNS = (
    percent_column("zorbo", "zorbo_zorbo"),
    percent_column("zorbo, all said", "zorbo_all"),
)
FORGETTING_COLUMNS = (
    percent_column("base's score lost", "lost_all"),
    percent_column("shapes lost", "lost_shape"),
)
SHAPES_COLUMNS = tuple(
    percent_column(name, f"shapes_{name}")
    for name in ("background", "colour", "position", "size", "shape", "all")
)  # fmt: skip
SAME_FOR_ALL_SEEDS = ("parameters_m", "file_mb")  # for every seed
STEP_COLUMN = Column("s a step", "step_seconds", 2)

SAMPLED_COLUMNS = (
    *ZORBO_COLUMNS,
    Column("zorbo, against the first row", "zorbo_zorbo", 1, 100.0, True),
    percent_column("shapes, all right", "shapes_all"),
    percent_column("shapes, shape right", "shapes_shape"),
    Column("shapes, all right, against the first row", "shapes_all", 1, 100.0, True),
)

PARTS_WITH_BUNDLED_BASE = (
    "lesson",
    "kinds",
    "bases",
    "rows",
    *METHOD_PART_NAMES,
    "preservation",
)  # parts that begin with the bundled base
UNTOUCHED_MEASURES = ("held_out", "zorbo_zorbo", "zorbo_all")

PART_COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "lesson": (*HELD_OUT_COLUMNS, *ZORBO_COLUMNS, *FORGETTING_COLUMNS),
    "scratch": (*HELD_OUT_COLUMNS, *SHAPES_COLUMNS),
    "still": (
        Column("mean loss", "loss_mean", 4), Column("variance of the loss, 1e-4", "loss_variance", 3, 1e4),
        Column("ratio", "loss_variance_ratio", 2, 1.0, True), Column("mean gradient norm", "grad_mean", 3),
        Column("variance of the norm, 1e-4", "grad_variance", 3, 1e4),
        Column("ratio ", "grad_variance_ratio", 2, 1.0, True),
    ),
    "kinds": (*HELD_OUT_COLUMNS, *ZORBO_COLUMNS, *FORGETTING_COLUMNS, Column("trained, M", "parameters_m", 2),
              Column("file, MB", "file_mb", 2), STEP_COLUMN),
    "bases": (Column("held-out loss before", "held_out_start", 4), *HELD_OUT_COLUMNS, *ZORBO_COLUMNS, *FORGETTING_COLUMNS, STEP_COLUMN),  # noqa: E501
    "rows": (*HELD_OUT_COLUMNS, *ZORBO_COLUMNS, *FORGETTING_COLUMNS, STEP_COLUMN),
    "exposure": HELD_OUT_COLUMNS,
    **dict.fromkeys(
        (*METHOD_PART_NAMES, "preservation"),
        (*HELD_OUT_COLUMNS, *ZORBO_COLUMNS, *FORGETTING_COLUMNS, STEP_COLUMN),
    ),
    **{f"at-{steps}": SAMPLED_COLUMNS for steps in SAMPLING_STEPS},
}  # fmt: skip

PART_NOTES: Mapping[str, str] = {
    "lesson": "zorbo: one is there; all said: and its colour, place and background are right. Lost: points "
    "of the untouched base's score of shapes (everything right; the shape right) that are gone.",
    "scratch": "Scores of shapes, {scratch_steps} steps of {scratch_batch} with muon from the same "
    "untrained transformer.",
    "still": "The loss and the norm of the LoRA's gradient over {still_steps} steps of {lesson_batch} in "
    "which no weight moves; pictures, noise and the density are the same in both rows.",
    "kinds": "Full rank's learning rate has the lowest held-out loss of {rates}, tried once with fp32 master "
    "weights and another seed; the LoRAs keep the example's. tiny: single blocks 1 and 4 of 8, at the depth "
    "of the preset's 7 and 20 of 38. Seconds a step are medians of single-threaded runs, two side by side: "
    "compare them within the table only.",
    "bases": "The blocks' linears are quantised; the LoRA is trained, measured and drawn on them. Lost: "
    "against the untouched bf16 base, so that what quantisation alone costs is in it. Step times: CPU.",
    "exposure": "Rollouts have probability 0.5 from the first step. Held-out loss is measured on the plain "
    "path for every row. What a rollout costs is in the plan: the seconds of these runs, beside other work, "
    "say nothing about it.",
    **{
        f"at-{steps}": "Scores of {exposure_prompts} unseen prompts each. Shapes: what the base could do "
        "before; the distance to its row is what the training lost."
        for steps in SAMPLING_STEPS
    },
    **METHOD_NOTES,
    "preservation": PRESERVATION_NOTE,
    "rows": "Padded: {padded} text rows in training, all of them visible. Its LoRA is measured as it was "
    "trained, and with trimmed text as a correct program uses it. The step times are medians of "
    "single-threaded runs, two side by side.",
}  # fmt: skip


def format_number(measured: Mapping[str, float | None], column: Column) -> str:
    """Mean and standard error; a single seed has no error."""
    mean, se = measured["mean"], measured["se"]
    assert mean is not None
    sign = "+" if column.is_difference and not column.measure.endswith("_ratio") else ""
    text = f"{mean * column.scale:{sign}.{column.digits}f}"
    same = se is None or (se == 0 and column.measure in SAME_FOR_ALL_SEEDS)
    return text if same else f"{text} ± {(se or 0.0) * column.scale:.{column.digits}f}"


def _format_cell(row: TableData, column: Column) -> str:
    found = row["against" if column.is_difference else "measures"].get(column.measure)
    return EMPTY_CELL if found is None else format_number(found, column)


def format_seeds(row: TableData) -> str:
    return f"{row['finished']} of {row['asked']}"


def render_grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_part_table(part: TableData) -> str:
    columns = PART_COLUMNS[part["name"]]
    rates = part["name"] == "kinds"
    in_words = part["name"] in (*METHOD_PART_NAMES, "preservation")
    headings = [
        "",
        "seeds",
        *(["learning rate"] if rates else []),
        *(column.heading for column in columns),
        *(["in words"] if in_words else []),
    ]
    rows = [
        [row["label"], format_seeds(row),
         *([", ".join(f"{one:g}" for one in row["learning_rates"]) or EMPTY_CELL] if rates else []),
         *(_format_cell(row, column) for column in columns),
         *([verdict_in_words(row)] if in_words else [])]
        for row in part["rows"]
    ]  # fmt: skip
    if part["name"] in PARTS_WITH_BUNDLED_BASE and "untouched" in part:
        rows.append(
            [
                "untouched base",
                "1",
                *([EMPTY_CELL] if rates else []),
                *_untouched_cells(part, columns),
                *([""] if in_words else []),
            ]
        )
    return render_grid(headings, rows)


def _untouched_cells(part: TableData, columns: Sequence[Column]) -> list[str]:
    known = {
        name: part["untouched"][name] for name in UNTOUCHED_MEASURES if name in part["untouched"]
    }
    return [
        EMPTY_CELL if one.is_difference or one.measure not in known
        else format_number({"mean": known[one.measure], "se": None}, one)
        for one in columns
    ]  # fmt: skip


def sigma_names(part: TableData) -> list[str]:
    named = {name for row in part["rows"] for name in row["measures"] if name.startswith("sigma_")}
    return sorted(named, key=lambda name: float(name.removeprefix("sigma_")))


def render_sigma_table(part: TableData) -> str:
    """Held-out loss by noise level."""
    names = sigma_names(part)
    rows = [
        [row["label"], *(_format_cell(row, Column("", name, 4)) for name in names)]
        for row in part["rows"]
        if row["measures"]
    ]
    return render_grid(["sigma", *(name.removeprefix("sigma_") for name in names)], rows)


def render_page(tables: Sequence[TableData]) -> str:
    """results/README.md."""
    told = [
        "# What chroma-nano decides",
        "",
        "Generated from the files beside it; change nothing here. Every row is the same training on several "
        "seeds (data order, noise, sigmas, LoRA's start); ± is the standard error over them, and differences "
        "are paired by seed. A row with fewer seeds than asked for says so. Held-out loss: unseen pictures "
        "at equidistant sigmas, always the same noise for a seed, so that its mean is the plain integral "
        "over sigma whatever density trained. Scores are read from pictures by geometry.",
    ]
    for table in tables:
        size = table["size"]
        words = {
            **size,
            "rates": ", ".join(f"{one:g}" for one in size["rates"]),
            "padded": 512,
            "exposure_prompts": EXPOSURE_PROMPTS,
        }
        told += ["", f"## {table['table']}", "", f"`{table['command']}`, {table['date']}, "
                 f"simpletuner {table['versions']['simpletuner']}, torch {table['versions']['torch']}, "
                 f"base {table['base']}."]  # fmt: skip
        for part in table["parts"]:
            told += [
                "",
                f"### {part['title']}",
                "",
                render_part_table(part),
                "",
                PART_NOTES[part["name"]].format(**words),
            ]
            if part["name"] == "kinds" and "trials" in part:
                tried = ", ".join(
                    f"{t['learning_rate']:g}: {t['held_out']:.4f}" for t in part["trials"]
                )
                told += ["", f"Held-out loss of the trials by learning rate: {tried}."]
            if part["name"] in ("lesson", "scratch") and sigma_names(part):
                told += ["", "Held-out loss by sigma:", "", render_sigma_table(part)]
    return "\n".join(told) + "\n"
