"""The routes of configurations, in an application of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from simpletuner.server.api import configs
from simpletuner.server.api_errors import register_error_handlers
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.draft_store import DraftStore
from simpletuner.server.plan_service import PlanService
from simpletuner.server.start_checks import StartChecks
from simpletuner.server.workspace import Workspace, run_id
from tests.server.queue_harness import make_device

V1 = "/api/v1"


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    place = Workspace(tmp_path.resolve())
    run = place.output_dir / "fox"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"lora_rank": 4, "output_dir": "x"}')
    (tmp_path / "pics").mkdir()
    fake = tmp_path / "fake.py"
    fake.write_text("print('{\"peak\": 1}')")
    runs = SimpleNamespace(find_folder=lambda id: run if id == run_id(run) else None)
    plans = PlanService(place, (sys.executable, str(fake)))
    app = FastAPI()
    datasets = DatasetService(place)
    app.state.services = SimpleNamespace(
        workspace=place,
        drafts=DraftStore(place),
        plans=plans,
        runs=runs,
        checks=StartChecks(place, datasets, lambda: [make_device("cuda")]),
        step_times=SimpleNamespace(correction=lambda flavour: (0.5, "fox")),
    )
    app.include_router(configs.router)
    register_error_handlers(app)
    return TestClient(app)


def test_schema(client: TestClient) -> None:
    found = client.get(f"{V1}/schema").json()
    assert found["options"][0]["name"] == "model_family"
    assert {preset["id"] for preset in found["presets"]} >= {"8gb", "nano"}


def test_validate(client: TestClient) -> None:
    body = {"config": {"lora_rank": 0}, "datasets": [{"id": "a", "instance_data_dir": "pics"}]}
    found = client.post(f"{V1}/validate", json=body).json()
    assert [problem["loc"] for problem in found["problems"]] == ["lora_rank"]
    body["config"] = {"lora_rank": 4}
    assert client.post(f"{V1}/validate", json=body).json()["changed"] == {"lora_rank": 4}


def test_a_draft_from_first_to_last(client: TestClient) -> None:
    body = {"name": "fox", "config": {"seed": 3}, "datasets": [{"id": "a"}]}
    made = client.post(f"{V1}/drafts", json=body)
    assert made.status_code == 201
    at = f"{V1}/drafts/{made.json()['id']}"
    assert client.put(at, json=body | {"version": 1}).json()["version"] == 2
    stale = client.put(at, json=body | {"version": 1})
    assert stale.status_code == 409
    assert stale.json()["detail"][0]["loc"] == "version"
    assert client.get(at).json()["version"] == 2
    assert [draft["name"] for draft in client.get(f"{V1}/drafts").json()] == ["fox"]
    exported = client.get(f"{at}/config.json")
    assert exported.json() == {"seed": 3}
    assert "attachment" in exported.headers["content-disposition"]
    assert client.get(f"{at}/multidatabackend.json").json() == [{"id": "a"}]
    assert client.delete(at).status_code == 204
    assert client.get(at).status_code == 404


def test_import_plan_and_copy_of_a_run(client: TestClient, tmp_path: Path) -> None:
    found = client.post(f"{V1}/import", json={"name": "c.json", "text": '{"network_rank": 8}'})
    assert found.json()["config"] == {"lora_rank": 8}
    state = client.post(f"{V1}/plan", json={"config": {}}).json()
    while state["state"] == "pending":
        state = client.post(f"{V1}/plan", json={"config": {}}).json()
    assert state["plan"] == {"peak": 1}
    id = run_id(tmp_path.resolve() / "output" / "fox")
    copied = client.post(f"{V1}/runs/{id}/draft", json={})
    assert copied.status_code == 201
    assert copied.json()["config"] == {"lora_rank": 4}
    assert client.post(f"{V1}/runs/{'0' * 12}/draft", json={}).status_code == 404


def test_half_a_character_and_unknown_fields_are_refused(client: TestClient) -> None:
    for path in ("validate", "drafts", "plan"):
        text = '{"name": "a", "config": {"validation_prompt": "\\ud800"}, "datasets": []}'
        text = text if path == "drafts" else text.replace('"name": "a", ', "")
        sent = client.post(
            f"{V1}/{path}", content=text, headers={"content-type": "application/json"}
        )
        assert sent.status_code == 422, path
        assert sent.json()["detail"][0]["loc"] == "config"
    deep = '{"config": {"a": ' + "[" * 500 + "]" * 500 + "}}"
    sent = client.post(f"{V1}/validate", content=deep, headers={"content-type": "application/json"})
    assert sent.status_code == 422
    assert client.post(f"{V1}/validate", json={"config": {}, "more": 1}).status_code == 422
