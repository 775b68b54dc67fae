"""Pages of the list of runs: filtered, sorted and cut by the server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from simpletuner.server.run_pages import select_page
from simpletuner.server.schemas.runs import RunQuery, RunSummary
from tests.server.run_folder_writer import RunFolderWriter, make_runs_app


def make_run(name: str, **fields: Any) -> RunSummary:
    usual = {
        "id": name, "name": name, "path": f"/w/{name}", "state": "done", "step": 5,
        "total_steps": 10, "loss": 0.5, "left_s": None, "started_t": 1.0, "changed_t": 2.0,
        "sparkline": [], "stage": None, "job": None,
    }  # fmt: skip
    return RunSummary(**{**usual, **fields})


RUNS = (
    make_run("waits", state="queued", step=0, total_steps=None, loss=None),
    make_run("again", state="queued", step=3),
    make_run("Fox-10", loss=0.2, step=9, tags=["animal", "Straße"]),
    make_run("fox-9", state="failed", loss=None, note="too much\nred"),
    make_run("owl", state="running", loss=0.1, step=1),
    make_run("old", archived=True, loss=0.9, step=10),
)


def names(**query: Any) -> list[str]:
    return [run.name for run in select_page(RUNS, RunQuery(**query)).runs]


def test_all_runs_in_their_order_unless_asked_otherwise() -> None:
    page = select_page(RUNS, RunQuery())
    assert [run.name for run in page.runs] == [run.name for run in RUNS]
    assert (page.total, page.all_runs, page.archived) == (6, 6, 1)
    hidden = select_page(RUNS, RunQuery(queued=False, archived=False))
    assert [run.name for run in hidden.runs] == ["again", "Fox-10", "fox-9", "owl"]
    assert (hidden.total, hidden.all_runs, hidden.archived) == (4, 5, 1)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"state": "active"}, ["waits", "again", "owl"]),
        ({"state": "done"}, ["Fox-10", "old"]),
        ({"state": "ended"}, ["fox-9"]),
        ({"words": "FOX"}, ["Fox-10", "fox-9"]),
        ({"words": " fox  red "}, ["fox-9"]),
        ({"words": "strasse animal"}, ["Fox-10"]),
        ({"words": "fox.*"}, []),
        ({"words": "fox", "state": "done"}, ["Fox-10"]),
        ({"sort": "name", "state": "any"}, ["again", "fox-9", "Fox-10", "old", "owl", "waits"]),
        ({"sort": "loss", "limit": 3}, ["owl", "Fox-10", "again"]),
        ({"sort": "progress", "limit": 2}, ["old", "Fox-10"]),
        ({"offset": 2, "limit": 2}, ["Fox-10", "fox-9"]),
        ({"offset": 99}, []),
    ],
)
def test_filter_order_and_part(query: dict[str, Any], expected: Sequence[str]) -> None:
    assert names(**query) == expected


def test_what_is_still_being_read_is_counted_where_the_page_depends_on_it() -> None:
    unread = {"fox-9", "old"}
    assert select_page(RUNS, RunQuery(limit=3), unread).unread == 0
    assert select_page(RUNS, RunQuery(limit=4), unread).unread == 1
    assert select_page(RUNS, RunQuery(limit=1, sort="loss"), unread).unread == 2


def test_names_of_digits_and_other_scripts_can_be_sorted() -> None:
    runs = [
        make_run(name) for name in ("b", "9", "10", "٣", "²", "०१", "a1b", "a", "९" * 99, "8" * 200)
    ]
    page = select_page(runs, RunQuery(sort="name"))
    assert [run.name for run in page.runs][:4] == ["9", "10", "8" * 200, "a"]
    assert len(page.runs) == len(runs)


def test_the_route_has_pages_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for at in range(5):
        RunFolderWriter(tmp_path / f"run-{at}").write_start().write_exit()
    with TestClient(make_runs_app(tmp_path)) as client:
        page = client.get("/api/v1/runs", params={"limit": 2, "offset": 4, "sort": "name"}).json()
        assert ([run["name"] for run in page["runs"]], page["total"]) == (["run-4"], 5)
        for query in (
            {"limit": 0}, {"limit": 501}, {"limit": "many"}, {"offset": -1}, {"sort": "id"},
            {"state": "dead"}, {"words": "x" * 201}, {"order": "name"}, {"offset": 10**30},
        ):  # fmt: skip
            answer = client.get("/api/v1/runs", params=query)
            (name,) = query
            assert answer.status_code == 422, query
            assert [problem["loc"] for problem in answer.json()["detail"]] == [name]
