"""The tables of a run, and the search in its log."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from simpletuner.events import event_types
from simpletuner.server import log_search
from simpletuner.server.run_reader import RunReader
from simpletuner.server.workspace import run_id
from tests.server.run_folder_writer import RunFolderWriter, make_runs_app


def evaluated(step: int, loss: float, best: bool = False) -> event_types.LossEvaluated:
    return event_types.LossEvaluated(step, "held", "val", loss, -0.1, 0.02, ((0.5, 0.4),), best)


def test_an_epoch_is_a_row_with_the_mean_of_its_losses(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 25, loss=float)
    rows = RunReader(run.path).tables().epochs
    assert [(row.epoch, row.first_step, row.last_step, row.loss) for row in rows] == [
        (1, 1, 9, 5.0), (2, 10, 19, 14.5), (3, 20, 25, 22.5),
    ]  # fmt: skip
    assert rows[0].seconds == pytest.approx(9 * 1.5)


def test_steps_that_a_resume_repeats_count_once(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 19, loss=float)
    run.write_start(resumed=5).write_steps(6, 12, loss=lambda step: 100.0)
    rows = RunReader(run.path).tables().epochs
    assert [(row.first_step, row.last_step) for row in rows] == [(1, 9), (10, 12)]
    assert rows[0].loss == pytest.approx((1 + 2 + 3 + 4 + 5 + 4 * 100) / 9)


def test_losses_that_are_not_finite_are_left_out_of_the_mean(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    run.write_steps(1, 2, loss=lambda step: float("nan")).write_events(evaluated(2, float("nan")))
    tables = RunReader(run.path).tables()
    assert tables.epochs[0].loss is None
    assert tables.held_out[0].loss is None


def test_held_out_losses_are_rows_in_order(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    run.write_events(evaluated(0, 0.5), evaluated(20, 0.4, True), evaluated(10, 0.45))
    rows = RunReader(run.path).tables().held_out
    assert [(row.step, row.loss, row.best) for row in rows] == [
        (0, 0.5, False), (10, 0.45, False), (20, 0.4, True),
    ]  # fmt: skip
    assert (rows[0].change, rows[0].change_se) == (-0.1, 0.02)


def test_both_routes(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 3)
    (run.path / "train.log").write_text("one\nTwo errors\nthree\nTWO more\n")
    base = f"/api/v1/runs/{run_id(run.path)}"
    with TestClient(make_runs_app(tmp_path)) as client:
        assert len(client.get(f"{base}/tables").json()["epochs"]) == 1
        found = client.get(f"{base}/log/matches", params={"text": "two"}).json()
        assert found == {
            "count": 2,
            "lines": [{"number": 2, "text": "Two errors"}, {"number": 4, "text": "TWO more"}],
        }
        for query in ({}, {"text": ""}, {"text": "x" * 201}, {"text": "x", "limit": 0}):
            assert client.get(f"{base}/log/matches", params=query).status_code == 422
        for route in ("tables", "log/matches?text=x"):
            assert client.get(f"/api/v1/runs/{'0' * 12}/{route}").status_code == 404


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("(a+)+b", [1]), ("STRASSE", [2]), ("Ünder", [3]), ("\ufffd", [4]), ("a", [1, 2, 3])],
)
def test_the_text_is_not_a_pattern_and_case_does_not_matter(
    tmp_path: Path, text: str, numbers: list[int]
) -> None:
    log = tmp_path / "train.log"
    log.write_bytes("(a+)+b\nStraße\nünder a\n".encode() + b"\xff\n")
    assert [line.number for line in log_search.search_log(log, text, 9).lines] == numbers


def test_a_long_log_and_a_long_line_are_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_search, "MAX_LINE_BYTES", 64)
    log = tmp_path / "train.log"
    log.write_text("x" * 500 + "\n" + "needle\n" * 30)
    matches = log_search.search_log(log, "needle", 5)
    assert (matches.count, [line.number for line in matches.lines]) == (30, [27, 28, 29, 30, 31])


def test_a_log_that_is_missing_or_no_file_has_no_matches(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("needle")
    (tmp_path / "link.log").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe.log")
    for name in ("missing.log", "link.log", "pipe.log"):
        assert log_search.search_log(tmp_path / name, "needle", 5).count == 0
