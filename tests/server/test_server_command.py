"""`simpletuner server` as a process: quick, small, without torch, alone on its port."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.quick import assert_quick, children_s

COMMAND = [sys.executable, "-m", "simpletuner", "server"]
PATIENCE_S = 120.0
HEAVY = (
    *("torch", "transformers", "diffusers", "peft", "numpy", "PIL", "rich", "huggingface_hub"),
    *("datasets", "pyarrow", "pandas", "fsspec", "safetensors", "httpx", "requests", "yaml"),
)


@contextmanager
def served(
    workspace: Path, *words: str, start: tuple[str, ...] = tuple(COMMAND), token: str = ""
) -> Iterator[tuple[Any, str]]:
    """The process, and the line that tells the address."""
    environ = {
        key: value for key, value in os.environ.items() if not key.startswith("SIMPLETUNER_")
    }
    environ |= {"SIMPLETUNER_SERVER_TOKEN": token} if token else {}
    process = subprocess.Popen(
        [*start, "--workspace", str(workspace), "--port", "0", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, line + process.stdout.read()
        yield process, line
    finally:
        process.kill()
        process.communicate()


def port_of(line: str) -> int:
    found = re.search(r":(\d+)/", line)
    assert found is not None, line
    return int(found[1])


def get(port: int, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def seconds_of_cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' /proc")
def test_ready_soon_and_small(tmp_path: Path) -> None:
    with served(tmp_path) as (process, line):
        assert get(port_of(line), "/api/v1/system")[0] == 200
        assert seconds_of_cpu(process.pid) < 2.0
        for path in ("schema", "drafts", "runs", "queue", "datasets", "folders", "docs"):
            assert get(port_of(line), f"/api/v1/{path}")[0] == 200, path
        assert resident_mb(process.pid) < 80


def test_what_it_imports() -> None:
    """The application with every route answered once that reads only; nothing heavy is loaded."""
    code = """
import sys, tempfile
from pathlib import Path
from starlette.testclient import TestClient
from simpletuner.cli.server import command
from simpletuner.server.app import create_app
from simpletuner.server.workspace import Workspace
from simpletuner.server.settings import ServerSettings
with tempfile.TemporaryDirectory() as folder:
    app = create_app(ServerSettings(Workspace(Path(folder))))
    with TestClient(app, base_url="http://localhost") as client:
        for path in ("system", "schema", "drafts", "runs", "queue", "datasets", "folders"):
            assert client.get(f"/api/v1/{path}").status_code == 200, path
        wanted = {"config": {"train_batch_size": 0}, "datasets": []}
        assert client.post("/api/v1/validate", json=wanted).status_code == 200
print(sorted(set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout
    for name in HEAVY:
        assert f"'{name}'" not in loaded, f"{name} is imported"
    assert "'fastapi'" in loaded


def test_only_this_machine_reaches_it(tmp_path: Path) -> None:
    with served(tmp_path) as (_, line):
        port = port_of(line)
        if sys.platform == "linux":
            listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
            ours = {row.split()[1] for row in listening if row.split()[3] == "0A"}
            assert [one for one in ours if one.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
        assert get(port, "/")[0] in (200, 503)
        assert get(port, "/", {"Host": "evil.example"})[0] == 403
        assert get(port, "/api/v1/runs", {"Origin": "http://evil.example"})[0] == 403


def test_a_foreign_page_gets_no_web_socket(tmp_path: Path) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    with served(tmp_path) as (_, line):
        address = f"ws://localhost:{port_of(line)}/api/v1/live"
        for origin in ("http://evil.example", "null"):
            with (
                pytest.raises(InvalidStatus) as raised,
                connect(address, additional_headers={"Origin": origin}),
            ):
                pass
            assert raised.value.response.status_code == 403
        with connect(
            address, origin=f"http://localhost:{port_of(line)}", open_timeout=PATIENCE_S
        ) as live:  # type: ignore[arg-type]
            assert json.loads(live.recv(timeout=PATIENCE_S))["runs"] == []


def test_others_need_the_token_that_is_made(tmp_path: Path) -> None:
    with served(tmp_path, "--host", "0.0.0.0") as (process, line):
        port, word = port_of(line), line.strip().rpartition("#/login/")[2]
        file = tmp_path / ".simpletuner" / "token"
        token = file.read_text().strip()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert token not in line
        assert len(word) == 43
        assert get(port, "/api/v1/runs")[0] == 401
        assert get(port, "/api/v1/runs", {"Authorization": f"Bearer {token}"})[0] == 200
        process.send_signal(signal.SIGINT)
        assert token not in process.communicate(timeout=PATIENCE_S)[0]


def test_a_token_need_not_stand_in_the_list_of_processes(tmp_path: Path) -> None:
    token = "chosen-by-a-person-0123"
    with served(tmp_path, "--host", "0.0.0.0", token=token) as (process, line):
        assert get(port_of(line), "/api/v1/runs")[0] == 401
        assert get(port_of(line), "/api/v1/runs", {"Authorization": f"Bearer {token}"})[0] == 200
        assert not (tmp_path / ".simpletuner" / "token").exists(), "none is made where one is given"
        if sys.platform == "linux":
            assert token.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    said = " ".join(refused("--help", cwd=tmp_path).stdout.split())
    assert "Every user of this machine sees a command line" in said
    assert "SIMPLETUNER_SERVER_TOKEN" in said


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGTERM])
def test_its_end_is_orderly_and_leaves_trainings_alone(
    tmp_path: Path, word: signal.Signals
) -> None:
    with served(tmp_path) as (process, _):
        process.send_signal(word)
        told, _ = process.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in told
        if word is signal.SIGINT:
            assert "Running trainings continue" in told
            assert process.returncode == 0


def refused(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], cwd=cwd, capture_output=True, text=True, check=False)


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = refused("--port", port, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--token", "short"], "at least 16"),
        (["--host", "203.0.113.7"], "203.0.113.7"),
        (["--workspace", "nowhere"], "nowhere"),
        (["--root", "nowhere"], "nowhere"),
        (["--port", "99999"], "99999"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    done = refused(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick(tmp_path: Path) -> None:
    found = list[subprocess.CompletedProcess[str]]()
    assert_quick(lambda: found.append(refused("--help", cwd=tmp_path)), 1, children_s)
    assert found[0].returncode == 0
    assert "--allow-host" in found[0].stdout


def test_eight_pages_at_once(tmp_path: Path) -> None:
    """One connection each for the live data leaves every page able to ask for more."""
    from websockets.sync.client import connect

    with served(tmp_path) as (_, line):
        address = f"ws://localhost:{port_of(line)}/api/v1/live"
        pages = [connect(address, open_timeout=PATIENCE_S) for _ in range(8)]
        for page in pages:
            assert "queue" in json.loads(page.recv(timeout=PATIENCE_S))
            assert get(port_of(line), "/api/v1/runs")[0] == 200
        for page in pages:
            page.close()
