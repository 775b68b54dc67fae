"""The benchmark of verdicts: its runs are valid, and its page says what they show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.nano import stopping
from benchmarks.nano.stopping import ROWS, StoppingResult

from simpletuner.config.load import load_config
from simpletuner.events.event_log import EventLog
from simpletuner.events.event_types import LossEvaluated, VerdictReached


@pytest.mark.parametrize("row", ROWS, ids=[row.label for row in ROWS])
def test_the_runs_are_valid(row: stopping.StoppingRow, tmp_path: Path) -> None:
    (tmp_path / "sets.json").write_text("[]")
    options = stopping.run_options(row, tmp_path / "sets.json", 1, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(options))
    loaded = load_config(config_path=tmp_path / "config.json", environ={}, cwd=tmp_path)
    assert loaded.config.training.max_train_steps == row.steps
    assert loaded.config.validation.eval_steps_interval == row.steps // stopping.MEASUREMENTS


def test_the_page_says_which_verdicts_were_expected() -> None:
    results = [
        StoppingResult("cut short", 1, "learning", 36, 40, {0: 0.2, 40: 0.1}),
        StoppingResult("made to overfit", 1, "learning", 36, 400, {0: 0.2, 80: 0.1, 400: 0.15}),
    ]
    page = stopping.render(results, "--seeds 1")
    assert "the one that the run was made for in 1 of 2 runs" in page
    assert (
        "| cut short | 1 | learning (since step 36) | 40 of 40 | 0.1000 (step 40) | 0.1000 |"
        in page
    )
    assert "| 400 of 400 | 0.1000 (step 80) | 0.1500 |" in page


def test_a_run_is_read_from_its_events(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no verdict"):
        stopping.read_result(ROWS[0], 1, tmp_path)
    log = EventLog(tmp_path / "events.jsonl")
    for step, loss in ((0, 0.3), (4, 0.25)):
        log.append(LossEvaluated(step, "a", "eval", loss, 0.0, 0.0, (), False))
        log.append(LossEvaluated(step, "a", "train", 9.0, 0.0, 0.0, (), False))
    log.append(VerdictReached(4, "learning", 0, 4, 16, -0.05, 0.01))
    log.close()
    result = stopping.read_result(ROWS[0], 1, tmp_path)
    assert (result.losses, result.best_step, result.verdict) == ({0: 0.3, 4: 0.25}, 4, "learning")
