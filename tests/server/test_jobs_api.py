"""The queue over HTTP; files of control/ only where a run is running."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from simpletuner.server.api import jobs
from simpletuner.server.api_errors import register_error_handlers
from simpletuner.server.plan_service import PlanService
from simpletuner.server.step_times import StepTimes
from simpletuner.server.workspace import run_id
from simpletuner.training.run_folder import RunFolder
from tests.server.queue_harness import QueueHarness

API = "/api/v1"


@pytest.fixture
def harness(tmp_path: Path) -> QueueHarness:
    return QueueHarness(Path(os.path.realpath(tmp_path)))


@pytest.fixture
def client(harness: QueueHarness) -> TestClient:
    app = FastAPI()
    app.state.services = SimpleNamespace(
        jobs=harness.jobs,
        runs=harness.runs,
        drafts=harness.drafts,
        plans=PlanService(harness.workspace),
        step_times=StepTimes(harness.jobs, harness.runs),
    )
    register_error_handlers(app)
    app.include_router(jobs.router)
    return TestClient(app)


def test_enqueue_look_arrange_withdraw(harness: QueueHarness, client: TestClient) -> None:
    made = [
        client.post(f"{API}/jobs", json={"draft": harness.create_draft(name)})
        for name in ("one", "two")
    ]
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


def test_a_draft_that_does_not_hold_names_its_options(
    harness: QueueHarness, client: TestClient
) -> None:
    answer = client.post(
        f"{API}/jobs", json={"draft": harness.create_draft(lora_rank="much", output_dir="/etc/x")}
    )
    assert answer.status_code == 422
    assert {one["loc"] for one in answer.json()["detail"]} == {"lora_rank", "output_dir"}


@pytest.mark.parametrize(
    ("route", "file"), [("stop", "stop"), ("save", "save"), ("sample", "validate")]
)
def test_what_a_run_is_asked_for(
    harness: QueueHarness, client: TestClient, route: str, file: str
) -> None:
    folder = RunFolder(harness.workspace.output_dir / "by-hand")
    with folder:
        folder.write_config({})
        answer = client.post(f"{API}/runs/{run_id(folder.path)}/{route}", json={})
        assert answer.status_code == 200
        assert answer.json()["id"] == run_id(folder.path)
        assert folder.consume_control_request(file)
    answer = client.post(f"{API}/runs/{run_id(folder.path)}/{route}", json={})
    assert answer.status_code == 409
    assert not folder.consume_control_request(file), "nothing is left for the next training"


@pytest.mark.parametrize(
    "config",
    [
        {"validation_disable": True, "validation_prompt": "a zorbo"},
        {"validation_prompt": None, "user_prompt_library": None},
        {"validation_prompt": None, "validation_prompt_library": False},
    ],
)
def test_a_run_without_pictures_is_not_asked_for_them(
    harness: QueueHarness, client: TestClient, config: dict[str, object]
) -> None:
    with RunFolder(harness.workspace.output_dir / "by-hand") as folder:
        folder.write_config(config)
        answer = client.post(f"{API}/runs/{run_id(folder.path)}/sample", json={})
        assert answer.status_code == 409
        assert "no samples to generate" in answer.json()["detail"][0]["message"]
        assert not folder.consume_control_request("validate")
        assert client.post(f"{API}/runs/{run_id(folder.path)}/save", json={}).status_code == 200


@pytest.mark.parametrize(
    "config",
    [
        {"validation_prompt": None, "user_prompt_library": None, "validation_prompt_library": True},
        {"validation_prompt": None, "user_prompt_library": "prompts.json"},
        {"validation_prompt": "a zorbo"},
    ],
)
def test_each_source_of_prompts_is_enough_for_images_now(
    harness: QueueHarness, client: TestClient, config: dict[str, object]
) -> None:
    with RunFolder(harness.workspace.output_dir / "by-hand") as folder:
        folder.write_config(config)
        answer = client.post(f"{API}/runs/{run_id(folder.path)}/sample", json={})
        assert answer.status_code == 200, answer.text
        assert folder.consume_control_request("validate")


def test_a_link_in_the_place_of_control_is_not_followed(
    harness: QueueHarness, client: TestClient, tmp_path: Path
) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    with RunFolder(harness.workspace.output_dir / "by-hand") as folder:
        folder.write_config({})
        (folder.path / "control").rmdir()
        (folder.path / "control").symlink_to(outside)
        answer = client.post(f"{API}/runs/{run_id(folder.path)}/save", json={})
        assert answer.status_code == 404
    assert list(outside.iterdir()) == []


def test_a_run_that_waits_is_withdrawn_not_stopped(
    harness: QueueHarness, client: TestClient
) -> None:
    job = harness.enqueue()
    answer = client.post(f"{API}/runs/{job.run}/stop", json={})
    assert answer.status_code == 409
    assert "remove its job from the queue" in answer.json()["detail"][0]["message"]


def test_resume(harness: QueueHarness, client: TestClient) -> None:
    with RunFolder(harness.workspace.output_dir / "by-hand") as folder:
        folder.write_config(
            {"max_train_steps": 5, "data_backend_config": harness.write_dataset_file()}
        )
        id = run_id(folder.path)
        answer = client.post(f"{API}/runs/{id}/resume", json={"max_train_steps": 9})
        assert answer.status_code == 409, "it is running"
    answer = client.post(f"{API}/runs/{id}/resume", json={"max_train_steps": 9})
    assert answer.status_code == 201
    assert (answer.json()["run"], answer.json()["state"]) == (id, "queued")
    assert client.get(f"{API}/queue").json()["jobs"][0]["id"] == answer.json()["id"]
