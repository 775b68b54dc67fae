"""The validation prompts of a run: shown, and edited where a training will read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from simpletuner.events.event_types import PromptsChosen
from simpletuner.server import run_finder, run_prompts
from simpletuner.server.workspace import run_id
from simpletuner.training.run_folder import EDITED_PROMPTS
from simpletuner.validation.prompts import Prompt, parse_edited_prompts
from tests.server.run_folder_writer import RunFolderWriter, make_runs_app

USED = PromptsChosen(0, (("validation", "a cat", "dogs", None), ("é.1", "x", "", 3)), False)
NEW = [{"name": "fox", "prompt": "a fox", "seed": 7}, {"name": "owl", "prompt": "an owl"}]


@pytest.fixture(autouse=True)
def _scans_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_finder, "RESCAN_INTERVAL_S", 0.0)


@pytest.fixture
def run(tmp_path: Path) -> RunFolderWriter:
    return RunFolderWriter(tmp_path / "run").write_start().write_events(USED).write_steps(1, 2)


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(make_runs_app(tmp_path))


def url(run: RunFolderWriter) -> str:
    return f"/api/v1/runs/{run_id(run.path)}/prompts"


def test_the_file_is_the_one_that_the_training_reads() -> None:
    assert run_prompts.EDITED_PROMPTS == EDITED_PROMPTS


def test_edits_wait_for_the_next_validation(run: RunFolderWriter, client: TestClient) -> None:
    with run.hold_lock():
        first = client.get(url(run)).json()
        assert (first["editable"], first["pending"]) == (True, False)
        assert [one["name"] for one in first["prompts"]] == ["validation", "--1"]
        answer = client.put(url(run), json={"prompts": NEW}).json()
        assert (answer["editable"], answer["pending"]) == (True, True)
        assert client.get(url(run)).json() == answer
        text = (run.path / EDITED_PROMPTS).read_text()
        assert parse_edited_prompts(text, EDITED_PROMPTS, "") == (
            Prompt("fox", "a fox", "", 7),
            Prompt("owl", "an owl"),
        )
        rows = (("fox", "a fox", "", 7), ("owl", "an owl", "", None))
        run.write_events(PromptsChosen(2, rows, True))
        after = client.get(url(run)).json()
        assert (after["pending"], after["prompts"]) == (False, answer["prompts"])


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        [{"name": "fox", "prompt": ""}],
        [{"name": "../fox", "prompt": "a fox"}],
        [{"name": "fox", "prompt": "a fox", "seed": -1}],
        [{"name": "fox", "prompt": "a fox"}, {"name": "FOX", "prompt": "a fox"}],
        [{"name": "fox", "prompt": "x" * 4001}],
        [{"name": f"fox-{number}", "prompt": "a fox"} for number in range(201)],
    ],
)
def test_what_is_refused(
    run: RunFolderWriter, client: TestClient, prompts: list[dict[str, object]]
) -> None:
    with run.hold_lock():
        assert client.put(url(run), json={"prompts": prompts}).status_code == 422
    assert not (run.path / EDITED_PROMPTS).exists()


def test_only_a_run_that_trains_and_generates_images(
    tmp_path: Path, run: RunFolderWriter, client: TestClient
) -> None:
    answer = client.put(url(run), json={"prompts": NEW})
    assert (answer.status_code, client.get(url(run)).json()["editable"]) == (409, False)
    other = RunFolderWriter(tmp_path / "other").write_start().write_steps(1, 2)
    with other.hold_lock():
        answer = client.put(url(other), json={"prompts": NEW})
        assert answer.status_code == 409
        assert "no validation prompts" in answer.json()["detail"][0]["message"]
    assert client.put("/api/v1/runs/000000000000/prompts", json={"prompts": NEW}).status_code == 404


def test_a_link_out_of_the_run_is_not_followed(
    tmp_path: Path, run: RunFolderWriter, client: TestClient
) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (run.path / "control").rmdir()
    (run.path / "control").symlink_to(outside)
    with run.hold_lock():
        assert client.put(url(run), json={"prompts": NEW}).status_code == 404
        (outside / "prompts.json").write_text(json.dumps({"a": "secret"}))
        assert "secret" not in client.get(url(run)).text
    assert len(list(outside.iterdir())) == 1
