"""train --serve: the run's page while it trains, a clear refusal where the port is taken."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from simpletuner.cli import serve_while_training
from simpletuner.errors import ConfigError
from simpletuner.server.workspace import run_id
from simpletuner.training.run_folder import RunFolder


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
        return port


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with (
            pytest.raises(ConfigError, match=r"--serve: port .* is in use.*train without --serve"),
            serve_while_training.serve_while_training(tmp_path / "run", other.getsockname()[1]),
        ):
            pytest.fail("served")


def test_the_run_is_shown_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    port, outside = free_port(), tmp_path.parent / f"{tmp_path.name}-elsewhere" / "run"
    with (
        serve_while_training.serve_while_training(outside, port) as url,
        RunFolder(outside) as folder,
    ):
        folder.write_config({})
        assert url == f"http://localhost:{port}/#/runs/{run_id(outside)}"
        answer = asked(f"http://localhost:{port}/api/v1/runs/{run_id(outside)}")
        assert answer["summary"]["path"] == str(outside)
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pytest.fail("it is still served")


def asked(url: str) -> dict[str, dict[str, object]]:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                found: dict[str, dict[str, object]] = json.load(answer)
                return found
        except OSError:
            assert time.monotonic() < deadline, "never answered"
            time.sleep(0.1)


def test_train_knows_the_switch() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "simpletuner", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--serve" in said
