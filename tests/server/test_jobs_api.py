"""The queue over HTTP; files of control/ only where a run is running."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from simpletuner.server.api import jobs
from simpletuner.server.place import run_id
from simpletuner.server.refusal import answer_refusals
from simpletuner.training.rundir import RunFolder
from tests.server.bench import Bench

API = "/api/v1"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Path(os.path.realpath(tmp_path)))


@pytest.fixture
def client(bench: Bench) -> TestClient:
    app = FastAPI()
    app.state.home = SimpleNamespace(jobs=bench.jobs, runs=bench.runs)
    answer_refusals(app)
    app.include_router(jobs.router)
    return TestClient(app)


def test_enqueue_look_arrange_withdraw(bench: Bench, client: TestClient) -> None:
    made = [client.post(f"{API}/jobs", json={"draft": bench.draft(name)}) for name in ("one", "two")]
    assert [answer.status_code for answer in made] == [201, 201]
    first, second = (answer.json()["id"] for answer in made)
    queue = client.get(f"{API}/queue").json()
    assert [job["id"] for job in queue["jobs"]] == [first, second]
    assert (queue["paused"], queue["continue_on_error"]) == (False, False)
    answer = client.put(f"{API}/queue", json={"order": [second, first], "paused": True})
    assert [job["id"] for job in answer.json()["jobs"]] == [second, first]
    assert answer.json()["paused"] is True
    assert client.get(f"{API}/jobs/{first}").json()["state"] == "queued"
    assert client.delete(f"{API}/jobs/{first}").status_code == 204
    assert client.get(f"{API}/jobs/{first}").status_code == 404
    assert [job["id"] for job in client.get(f"{API}/queue").json()["jobs"]] == [second]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("jobs", {"draft": "0" * 12}, 404),
        ("jobs", {"draft": "../../x"}, 404),
        ("jobs", {"draft": "0" * 12, "kind": "shell"}, 422),
        ("jobs", {"draft": "0" * 12, "argv": ["sh"]}, 422),
        ("runs/000000000000/stop", {}, 404),
        ("runs/000000000000/resume", {}, 404),
        ("runs/000000000000/save", {}, 404),
        ("runs/..%2f..%2fetc/sample", {}, 404),
        ("runs/000000000000/stop", {"insist": "perhaps"}, 422),
    ],
)
def test_refusals(client: TestClient, path: str, body: dict[str, object], status: int) -> None:
    answer = client.post(f"{API}/{path}", json=body)
    assert answer.status_code == status
    assert "detail" in answer.json()


def test_a_draft_that_does_not_hold_names_its_options(bench: Bench, client: TestClient) -> None:
    answer = client.post(f"{API}/jobs", json={"draft": bench.draft(lora_rank="much", output_dir="/etc/x")})
    assert answer.status_code == 422
    assert {one["loc"] for one in answer.json()["detail"]} == {"lora_rank", "output_dir"}


@pytest.mark.parametrize(("route", "file"), [("stop", "stop"), ("save", "save"), ("sample", "validate")])
def test_what_a_run_is_asked_for(bench: Bench, client: TestClient, route: str, file: str) -> None:
    folder = RunFolder(bench.place.outputs / "by-hand")
    with folder:
        folder.write_config({})
        answer = client.post(f"{API}/runs/{run_id(folder.path)}/{route}", json={})
        assert answer.status_code == 200
        assert answer.json()["id"] == run_id(folder.path)
        assert folder.take_control(file)
    answer = client.post(f"{API}/runs/{run_id(folder.path)}/{route}", json={})
    assert answer.status_code == 409
    assert not folder.take_control(file), "nothing is left for the next training"


@pytest.mark.parametrize(
    "config", [{"validation_disable": True}, {"validation_prompt": None, "user_prompt_library": None}]
)
def test_a_run_without_pictures_is_not_asked_for_them(
    bench: Bench, client: TestClient, config: dict[str, object]
) -> None:
    with RunFolder(bench.place.outputs / "by-hand") as folder:
        folder.write_config(config)
        answer = client.post(f"{API}/runs/{run_id(folder.path)}/sample", json={})
        assert answer.status_code == 409
        assert "draws no pictures" in answer.json()["detail"][0]["message"]
        assert not folder.take_control("validate")
        assert client.post(f"{API}/runs/{run_id(folder.path)}/save", json={}).status_code == 200


def test_a_link_in_the_place_of_control_is_not_followed(
    bench: Bench, client: TestClient, tmp_path: Path
) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    with RunFolder(bench.place.outputs / "by-hand") as folder:
        folder.write_config({})
        (folder.path / "control").rmdir()
        (folder.path / "control").symlink_to(outside)
        answer = client.post(f"{API}/runs/{run_id(folder.path)}/save", json={})
        assert answer.status_code == 404
    assert list(outside.iterdir()) == []


def test_a_run_that_waits_is_withdrawn_not_stopped(bench: Bench, client: TestClient) -> None:
    job = bench.enqueue()
    answer = client.post(f"{API}/runs/{job.run}/stop", json={})
    assert answer.status_code == 409
    assert "withdraw" in answer.json()["detail"][0]["message"]


def test_resume(bench: Bench, client: TestClient) -> None:
    with RunFolder(bench.place.outputs / "by-hand") as folder:
        folder.write_config({"max_train_steps": 5, "data_backend_config": bench.by_hand()})
        id = run_id(folder.path)
        answer = client.post(f"{API}/runs/{id}/resume", json={"max_train_steps": 9})
        assert answer.status_code == 409, "it is running"
    answer = client.post(f"{API}/runs/{id}/resume", json={"max_train_steps": 9})
    assert answer.status_code == 201
    assert (answer.json()["run"], answer.json()["state"]) == (id, "queued")
    assert client.get(f"{API}/queue").json()["jobs"][0]["id"] == answer.json()["id"]
