"""Prompt libraries of the workspace, and sizes and strengths of single prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from simpletuner.config.schema import ValidationOptions
from simpletuner.server.app import create_app
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace
from simpletuner.validation.prompts import Prompt, read_prompts

ROUTE = "/api/v1/prompt-libraries"
FOX = {"name": "fox", "prompt": "a fox", "size": "512x768", "adapter_strength": 0.5}
OWL = {"name": "owl", "prompt": "an owl", "negative_prompt": "blurry", "seed": 7}


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    settings = ServerSettings(Workspace(tmp_path.resolve()))
    return TestClient(create_app(settings), base_url="http://127.0.0.1")


def restore(client: TestClient, entry: dict[str, object]) -> None:
    route = f"/api/v1/trash/{entry['id']}/restore"
    assert client.post(route, headers={"content-type": "application/json"}).status_code == 200


def test_a_library_is_saved_replaced_deleted_and_restored(
    client: TestClient, tmp_path: Path
) -> None:
    assert client.get(ROUTE).json() == []
    saved = client.put(f"{ROUTE}/animals", json={"prompts": [FOX, OWL]}).json()
    assert [prompt["name"] for prompt in saved["prompts"]] == ["fox", "owl"]
    assert saved["prompts"][0]["size"] == "512x768"
    # A training from a terminal reads the same file.
    options = ValidationOptions(user_prompt_library=str(tmp_path / "prompts" / "animals.json"))
    assert read_prompts(options, tmp_path) == (
        Prompt("fox", "a fox", "", None, "512x768", 0.5),
        Prompt("owl", "an owl", "blurry", 7),
    )
    client.put(f"{ROUTE}/animals", json={"prompts": [OWL]})
    assert [len(row["prompts"]) for row in client.get(ROUTE).json()] == [1]
    (replaced,) = client.get("/api/v1/trash").json()
    restore(client, replaced)
    assert [len(row["prompts"]) for row in client.get(ROUTE).json()] == [2]
    deleted = client.delete(f"{ROUTE}/animals").json()
    assert (deleted["kind"], client.get(ROUTE).json()) == ("prompts", [])
    restore(client, deleted)
    assert client.get(f"{ROUTE}/animals").json()["name"] == "animals"


def test_a_library_of_the_user_is_read(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "mine.json").write_text(json.dumps({"cat": "a cat", "bad/name": "x"}))
    (tmp_path / "prompts" / "damaged.json").write_text("{")
    assert [row["name"] for row in client.get(ROUTE).json()] == ["mine"]
    assert client.get(f"{ROUTE}/damaged").status_code == 404


@pytest.mark.parametrize("name", ["..", ".hidden", "a%2Fb", "a b", "x" * 65, "%00", "a\\b"])
def test_no_name_leads_out(client: TestClient, tmp_path: Path, name: str) -> None:
    answers = [
        client.put(f"{ROUTE}/{name}", json={"prompts": [FOX]}),
        client.get(f"{ROUTE}/{name}"),
        client.delete(f"{ROUTE}/{name}"),
    ]
    assert all(answer.status_code in (404, 405, 422) for answer in answers)
    assert not list(tmp_path.rglob("*.json"))


def test_a_link_is_not_followed(client: TestClient, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside.json"
    outside.write_text(json.dumps({"a": "secret"}))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "link.json").symlink_to(outside)
    assert client.put(f"{ROUTE}/link", json={"prompts": [FOX]}).status_code == 404
    assert "secret" in outside.read_text()
    assert "secret" not in client.get(f"{ROUTE}/link").text


@pytest.mark.parametrize(
    "change",
    [
        {"size": "63"},
        {"size": "512x4097"},
        {"size": "512 x 512"},
        {"adapter_strength": 11},
        {"adapter_strength": "nan"},
    ],
)
def test_what_a_training_would_refuse_is_refused(
    client: TestClient, change: dict[str, object]
) -> None:
    body = {"prompts": [FOX | change]}
    assert client.put(f"{ROUTE}/x", json=body).status_code == 422
