"""The table of the benchmark of sources."""

from __future__ import annotations

from typing import Any

from benchmarks import datasets

RESULT: dict[str, Any] = {
    "source": "local", "images": 10_000, "torch": "2.13", "cpu_model": "AMD EPYC", "page_mb": 1.44,
    "inspect_headers_s": (2.5, 3.04), "inspect_s": [20.0, 33.26], "first_step_s": [90.0, 170.0],
    "stages_s": {"scan": 2.04, "encode images": 70.0},
}  # fmt: skip


def test_the_table_has_a_column_for_each_source_and_says_what_was_not_run() -> None:
    inspected = {key: RESULT[key] for key in RESULT if key not in ("first_step_s", "stages_s")}
    page = datasets.render_table([RESULT, {**inspected, "source": "tar"}], "the command")
    assert "    the command\n" in page
    assert "10,000 images" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows[0] == "|  | local | tar |"
    assert "| inspect, headers only: CPU s | 3.0 | 3.0 |" in rows
    assert "| train to the first step: wall s | 90.0 | not run |" in rows
    assert "| of which scan: wall s | 2.0 | not run |" in rows
    assert rows[-1] == "| page of inspect, MB | 1.4 | 1.4 |"
