"""The guides of methods and of preservation say what the tables say, on made-up results."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import benchmarks.nano.__main__ as nano
import pytest
from benchmarks.nano import (
    comparison_figure,
    comparison_page,
    experiment_inputs,
    experiments,
    result_tables,
    verdicts,
)
from benchmarks.nano.__main__ import COMPARISONS, DOCS, RESULTS
from benchmarks.nano.cell_result import RESULT_FILE, write_result
from benchmarks.nano.experiment_inputs import base_fingerprint
from benchmarks.nano.experiments import FULL_EXPERIMENT, SEEDS, TABLES

from tests.benchmarks.test_nano import one_result

# Held-out loss by row and seed: one clearly lower, one perhaps, one neither.
HELD_OUT = {
    "lesson": (0.0700, 0.0710, 0.0720),
    "methods-loraplus-4": (0.0600, 0.0611, 0.0619),
    "methods-ema": (0.0695, 0.0696, 0.0709),
    "methods-averaged": (0.0701, 0.0709, 0.0720),
    "methods-batch-1": (0.0800,),
}


def difference(mean: float, se: float | None) -> dict[str, float | None]:
    return {"mean": mean, "se": se}


def methods_table() -> result_tables.TableData:
    done = {
        experiments.cell_name(name, seed): one_result(value)
        for name, values in HELD_OUT.items()
        for seed, value in zip(SEEDS, values)
    }
    touched = {"shapes": {"all": (0.75, 0.1, 64), "shape": (0.8, 0.1, 90)}}
    done[experiments.cell_name("base", SEEDS[0])] = one_result(0.5, scores=touched)
    return result_tables.build_table("methods", done, FULL_EXPERIMENT, SEEDS, "command", "b")


@pytest.mark.parametrize(
    ("held_out", "learnt", "lost", "words"),
    [
        (-0.01, 0.3, 0.001, "lower held-out loss, more learnt"),
        (0.01, -0.3, 0.1, "higher held-out loss, less learnt, more forgotten"),
        (0.001, 0.01, -0.1, "less forgotten"),
        (0.003, -0.12, 0.001, "perhaps higher held-out loss, perhaps less learnt"),
        (0.0, 0.01, 0.001, "no difference"),
    ],
)
def test_a_difference_is_clear_at_95_percent(
    held_out: float, learnt: float, lost: float, words: str
) -> None:
    against = {
        "held_out": difference(held_out, 0.001),
        "zorbo_zorbo": difference(learnt, 0.05),
        "lost_all": difference(lost, 0.02),
    }
    assert verdicts.verdict_in_words({"against": against, "finished": 3}) == words
    two_seeds = verdicts.verdict_in_words({"against": against, "finished": 2})
    assert two_seeds.count("perhaps") == len(re.findall("loss|learnt|forgotten", two_seeds))


def test_a_single_seed_has_no_verdict() -> None:
    row = {"against": {"held_out": difference(1.0, None)}, "finished": 1}
    assert verdicts.verdict_in_words(row) == ""
    assert verdicts.verdict_in_words({"against": {}, "finished": 0}) == ""


def test_the_guide_shows_the_table_and_its_plot() -> None:
    page = comparison_page.update_page(
        (DOCS / "methods.md").read_text(encoding="utf-8"), methods_table(), "methods.svg"
    )
    assert "](methods.svg)" in page
    assert comparison_page.NOT_MEASURED not in page
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if "of 3 |" in line}
    assert len(rows) == sum(len({row.label for row in part.rows}) for part in TABLES["methods"])
    assert rows["plain"].startswith("| plain | 3 of 3 | 71.0 ± 0.6 | 50.0 ± 0.0 | 25.0 ± 0.0 |")
    assert "| -10.0 ± 0.1 | +0.0 ± 0.7 | +0.0 ± 0.4 |" in rows["LoRA+, ratio 4"]
    assert rows["LoRA+, ratio 4"].endswith("| lower held-out loss |")
    assert rows["EMA 0.99, its weights"].endswith("| perhaps lower held-out loss |")
    assert rows["mean of the last 3 checkpoints"].endswith("| no difference |")
    assert rows["batch 1, as many images seen"].endswith("|  |")
    assert "Better than plain in one measure and worse in none, clearly: LoRA+, ratio 4." in page
    assert "Too few seeds are finished to compare with batch 8." in page
    # Renewed from the same results the page stays, and without results it says so.
    assert comparison_page.update_page(page, methods_table(), "methods.svg") == page
    empty = result_tables.build_table("methods", {}, FULL_EXPERIMENT, SEEDS, "command", "b")
    assert comparison_page.NOT_MEASURED in comparison_page.update_page(page, empty, "methods.svg")
    with pytest.raises(ValueError, match="lacks"):
        comparison_page.update_page("no marks", empty, "methods.svg")


def test_the_report_writes_guides_and_plots_of_finished_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those of tables with a finished cell; nothing is trained."""
    docs, results, out = tmp_path / "docs", tmp_path / "results", tmp_path / "out"
    docs.mkdir()
    for name in COMPARISONS:
        shutil.copy(DOCS / f"{name}.md", docs)
    monkeypatch.setattr(nano, "DOCS", docs)
    monkeypatch.setattr(nano, "RESULTS", results)
    known = {cell.name: cell for cell in experiments.list_cells(FULL_EXPERIMENT, SEEDS)}
    for name in ("lesson/seed-1", "lesson/seed-2", "methods-ema/seed-1", "methods-ema/seed-2"):
        options = experiment_inputs.cell_options(known[name], FULL_EXPERIMENT)
        result = one_result(0.1 + len(name) / 1e4, options=options, base=base_fingerprint())
        (out / "cells" / name).mkdir(parents=True)
        write_result(out / "cells" / name / RESULT_FILE, result)
    words = ["--report", "--only", *COMPARISONS, "--out", str(out)]
    assert nano.main(words) == 0
    assert sorted(path.name for path in docs.iterdir()) == [
        "methods.md",
        "methods.svg",
        "preservation.md",
    ]
    page = (docs / "methods.md").read_text(encoding="utf-8")
    assert "| EMA 0.99, its weights | 2 of 3 | +0.5 ± 0.0 |" in page
    assert comparison_page.NOT_MEASURED in (docs / "preservation.md").read_text(encoding="utf-8")
    assert "EMA 0.99, its weights" in (results / "README.md").read_text(encoding="utf-8")
    before = (docs / "methods.svg").read_text(encoding="utf-8")
    assert nano.main(words) == 0
    assert (docs / "methods.svg").read_text(encoding="utf-8") == before
    assert (docs / "methods.md").read_text(encoding="utf-8") == page


def test_the_plot_shows_what_differs() -> None:
    """A dot where the difference has an error; its colour says better, worse or neither."""

    def row(label: str, **differences: tuple[float, float | None]) -> dict[str, Any]:
        against = {name: difference(*values) for name, values in differences.items()}
        return {"label": label, "against": against, "finished": 3}

    rows = [
        row("plain"),
        row("better", held_out=(-0.005, 0.001), zorbo_zorbo=(0.25, 0.05)),
        row("worse & more", held_out=(0.005, 0.001), lost_all=(0.2, 0.04)),
        row("same", held_out=(0.003, 0.001), lost_all=(0.1, None)),
        row("missing"),
    ]
    column = comparison_figure.COLUMNS[0]
    assert comparison_figure.read_dot(rows[1], column) == comparison_figure.Dot(-5.0, 4.3)
    low, high = comparison_figure.axis_limits(rows, column)
    assert low < -9.3
    assert high > 9.3
    drawn = comparison_figure.render_figure({"parts": [{"title": "a part", "rows": rows}]})
    circles = re.findall(r'<circle [^>]*fill="([^"]*)"', drawn)
    better, worse, same = (
        comparison_figure.BETTER, comparison_figure.WORSE, comparison_figure.SAME,
    )  # fmt: skip
    assert circles == [better, better, worse, worse, same]
    assert "worse &amp; more" in drawn
    assert "a part, against: plain" in drawn


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_committed_guide_is_that_of_the_committed_results(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    if not (RESULTS / f"{name}.json").exists():
        assert comparison_page.NOT_MEASURED in page
        return
    table = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert comparison_page.update_page(page, table, f"{name}.svg") == page
    figure = (DOCS / f"{name}.svg").read_text(encoding="utf-8")
    assert figure == comparison_figure.render_figure(table)
