"""Defaults of new runs, the hub token that nobody reads back, and caches that may be deleted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
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
RUN_FILES = ("config.json", "events.jsonl", "train.log", "exit.json")


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


def read_of_processes(name: str) -> dict[str, bytes]:
    """Return process id -> a file of /proc; without those that end meanwhile or are another's."""
    found = {}
    for path in Path("/proc").glob(f"[0-9]*/{name}"):
        with contextlib.suppress(OSError):
            found[path.parent.name] = path.read_bytes()
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", ["done", "failed"])
def test_the_token_of_a_job_is_seen_by_its_owner_alone(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No command line, file or answer has it, while the job runs and when it has ended or failed."""
    gate = tmp_path / "gate"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("FAKE_GATE", str(gate))
    monkeypatch.setenv("FAKE_STEPS", "2")
    harness = QueueHarness((tmp_path / "workspace").resolve())
    preferences = Preferences(harness.workspace)
    preferences.write_hub_token(TOKEN)
    harness.supervisor = Supervisor(
        harness.jobs, lambda: [make_device("cpu")], variables=preferences.job_variables
    )
    job = harness.wait_for_state(harness.enqueue(), "running")
    own = [id for id, text in read_of_processes("environ").items() if TOKEN.encode() in text]
    assert own, "the job has it"
    assert not any(TOKEN.encode() in text for text in read_of_processes("cmdline").values())
    assert_answers_without_token(harness.workspace)
    if ending == "failed":
        for id in own:
            os.kill(int(id), signal.SIGKILL)
    gate.touch()
    ended = harness.wait_for_state(job, "done", "failed", "lost")
    assert (ended.state == "done") == (ending == "done")
    harness.supervisor.close()
    assert_answers_without_token(harness.workspace)
    holders = [
        path.name
        for path in harness.workspace.root.rglob("*")
        if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]
    assert holders == ["hub-token"]


def assert_answers_without_token(workspace: Workspace) -> None:
    """Ask every route that reads, about the job and its run, and what the pages show at a mistake."""
    client = TestClient(
        create_app(ServerSettings(workspace)),
        base_url="http://localhost:8001",
        raise_server_exceptions=False,
    )
    job = client.get("/api/v1/queue").json()["jobs"][0]
    answered = 0
    for path, methods in client.get("/api/v1/openapi.json").json()["paths"].items():
        if "get" in methods:
            ids = (job["id"], job["run"]) if "{id}" in path else ("",)
            files = (
                RUN_FILES if path.startswith("/api/v1/runs") and "{path}" in path else ("a.png",)
            )
            for id in ids:
                for file in files:
                    filled = path.replace("{id}", id).replace("{name}", "photos")
                    answer = client.get(filled.replace("{path}", file))
                    assert TOKEN not in answer.text + str(answer.headers), path
                    answered += answer.status_code == 200
    assert answered > 20


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
