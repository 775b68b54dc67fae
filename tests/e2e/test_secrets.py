"""The hub token is read from the environment or the hub's own file, and stands nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from huggingface_hub import HfApi

from simpletuner.server.app import create_app
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace
from simpletuner.training import hub_publisher, loop
from tests.e2e.training_project import TrainingProject

CANARY = "hf_canaryZ9x8w7v6u5t4s3r2q1p0"


def find_canary(root: Path) -> list[str]:
    return [
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and CANARY.encode() in path.read_bytes()
    ]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingProject:
    """A project whose hub is out of reach, so that its errors are reported."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(
        hub_publisher, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token=CANARY)
    )
    monkeypatch.setattr(hub_publisher, "upload_timeout_s", lambda _: 0.5)
    return TrainingProject(tmp_path / "work", max_train_steps=1, use_ema=False, push_to_hub=True)


def test_no_file_of_a_run_and_no_answer_of_the_server_holds_it(
    project: TrainingProject, capfd: pytest.CaptureFixture[str]
) -> None:
    run = project.train()
    assert (run / "README.md").is_file()
    assert "publish" in (run / "train.log").read_text(), "the refusal of the hub was reported"
    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err
    assert find_canary(project.root) == []
    client = TestClient(
        create_app(ServerSettings(Workspace(project.root))),
        base_url="http://127.0.0.1",
        raise_server_exceptions=False,
    )
    runs = client.get("/api/v1/runs").json()
    paths = client.get("/api/v1/openapi.json").json()["paths"]
    answers = [json.dumps(runs)]
    for path, methods in paths.items():
        if "get" in methods:
            for id in [str(one.get("id", "")) for one in _summaries(runs)] or ["x"]:
                filled = path.replace("{id}", id).replace("{path}", "config.json")
                answers.append(client.get(filled.replace("{name}", "x")).text)
    assert len(answers) > 10
    assert not any(CANARY in text for text in answers)
    assert find_canary(project.root) == [], "nor a file that the server has written"


def _summaries(runs: object) -> list[dict[str, object]]:
    if isinstance(runs, dict):
        return [one for value in runs.values() if isinstance(value, list) for one in value]
    return list(runs) if isinstance(runs, list) else []


def test_no_error_report_holds_it(
    project: TrainingProject, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(context: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        project.train()
    assert "RuntimeError: a bug" in (project.root / "run" / "train.log").read_text()
    assert find_canary(project.root) == []
    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err


def test_no_command_line_of_a_process_holds_it(tmp_path: Path) -> None:
    """The token reaches a process by its environment; ps shows words alone."""
    environ = {**os.environ, "HF_TOKEN": CANARY}
    words = [sys.executable, "-m", "simpletuner", "options", "hub_model_id"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    assert CANARY not in done.stdout + done.stderr
    from simpletuner.server.settings import TRAIN_COMMAND

    assert not any("token" in word.lower() for word in TRAIN_COMMAND)
