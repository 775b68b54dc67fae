"""Defaults of new runs, the hub token that nobody reads back, and caches that may be deleted."""

from __future__ import annotations

import json
import stat
import sys
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from simpletuner.server.api_errors import ApiError
from simpletuner.server.app import create_app
from simpletuner.server.preferences import Preferences
from simpletuner.server.settings import ServerSettings
from simpletuner.server.storage import clean_storage, measure_storage
from simpletuner.server.supervisor import Supervisor
from simpletuner.server.workspace import Workspace
from tests.server.queue_harness import QueueHarness, make_device

TOKEN = "hf_abcdefghijklmnop"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path.resolve())


def test_the_token_is_for_its_owner_alone_and_never_sent_back(workspace: Workspace) -> None:
    client = TestClient(create_app(ServerSettings(workspace)), base_url="http://localhost:8001")
    origin = {"origin": "http://localhost:8001"}
    sent = client.put("/api/v1/preferences/hub-token", json={"token": TOKEN}, headers=origin)
    assert sent.json()["has_hub_token"] is True
    path = workspace.server_dir / "hub-token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for route in ("preferences", "system", "storage", "trash"):
        assert TOKEN not in client.get(f"/api/v1/{route}").text
    assert client.get("/api/v1/runs").status_code == 200
    removed = client.put("/api/v1/preferences/hub-token", json={"token": ""}, headers=origin)
    assert removed.json()["has_hub_token"] is False
    assert not path.exists()


@pytest.mark.parametrize("token", ["a\nb", "ключ", "x" * 401, "\0"])
def test_a_token_is_one_line_of_ascii(workspace: Workspace, token: str) -> None:
    with pytest.raises(ApiError, match="one line"):
        Preferences(workspace).write_hub_token(token)


def test_an_open_file_in_its_place_is_replaced(workspace: Workspace) -> None:
    """A file that others can read does not pass its mode on to the token."""
    workspace.server_dir.mkdir()
    path = workspace.server_dir / "hub-token"
    path.write_text("old")
    path.chmod(0o644)
    Preferences(workspace).write_hub_token(TOKEN)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_jobs_get_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    harness = QueueHarness(tmp_path.resolve())
    preferences = Preferences(harness.workspace)
    preferences.write_hub_token(TOKEN)
    job = harness.enqueue("tokened")
    folder = harness.jobs.jobs_dir / job.id
    spec = harness.read_job_file(job, "job.json")
    show = "import os; print(os.environ.get('HF_TOKEN'))"
    (folder / "job.json").write_text(json.dumps({**spec, "argv": [sys.executable, "-c", show]}))
    supervisor = Supervisor(
        harness.jobs, lambda: [make_device("cpu")], variables=preferences.job_variables
    )
    deadline = time.monotonic() + 60
    log = folder / "output.log"
    while not log.exists() or TOKEN not in log.read_text():
        supervisor.run_once()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    supervisor.close()
    assert TOKEN not in (folder / "job.json").read_text()


def test_defaults_are_checked(workspace: Workspace) -> None:
    preferences = Preferences(workspace)
    assert preferences.write_defaults({"lora_rank": 4}).defaults == {"lora_rank": 4}
    assert Preferences(workspace).read().defaults == {"lora_rank": 4}
    for wrong in ({"lora_rank": 0}, {"unknown": 1}, {"webhook_config": "x.json"}):
        with pytest.raises(ApiError):
            preferences.write_defaults(wrong)
    assert preferences.read().defaults == {"lora_rank": 4}


def test_only_caches_can_be_deleted(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace.root / "cache"))
    thumbs = workspace.server_dir / "thumbs"
    thumbs.mkdir(parents=True)
    (thumbs / "a.jpg").write_bytes(b"12345")
    workspace.datasets_dir.mkdir()
    assert {one.name: one.size_bytes for one in measure_storage(workspace)} == {
        "datasets": 0,
        "thumbnails": 5,
    }
    clean_storage(workspace, "thumbnails")
    assert not thumbs.exists()
    for name in ("datasets", "runs", "hub", "..", ""):
        with pytest.raises(ApiError, match="no such cache"):
            clean_storage(workspace, name)
    assert workspace.datasets_dir.exists()
