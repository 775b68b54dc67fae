"""A server of its own as a process, and what a test prepares in its workspace."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[3]
STATIC_DIR = ROOT / "src" / "simpletuner" / "server" / "static"
EXAMPLE_DIR = ROOT / "src" / "simpletuner" / "examples" / "chroma-nano.peft-lora"
REAL_COMMAND = (sys.executable, "-m", "simpletuner", "server")
FAKE_COMMAND = (sys.executable, "-m", "tests.e2e.web.fake_server")
TIMEOUT_S = 120.0
# What a page may log while its server is down; which of them depends on the moment.
SERVER_DOWN = (
    r"net::ERR_(CONNECTION_REFUSED|CONNECTION_RESET|CONNECTION_CLOSED|CONNECTION_ABORTED"
    r"|EMPTY_RESPONSE|SOCKET_NOT_CONNECTED|INCOMPLETE_CHUNKED_ENCODING)|WebSocket|Failed to fetch"
)


class ServerProcess:
    """A workspace below `folder`, and its server, which keeps its port when it is restarted."""

    def __init__(
        self, folder: Path, command: tuple[str, ...] = REAL_COMMAND, name: str = "workspace"
    ) -> None:
        self.folder, self.command = folder, command
        self.workspace = folder / name
        self.workspace.mkdir(parents=True)
        (folder / "home").mkdir()
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def origin(self) -> str:
        return f"http://localhost:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """A person's folders are the test's own, and no hub is asked."""
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith("SIMPLETUNER_")
        }
        home = {
            "HOME": str(self.folder / "home"),
            "XDG_CACHE_HOME": str(self.folder / "home" / "cache"),
        }
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return {**kept, **home, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}

    def start(self) -> None:
        words = ["--workspace", str(self.workspace), "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, *words],
                cwd=self.workspace,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_until(self.is_ready, "the server answers")

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            return self.request("GET", "system")[0] == 200
        except OSError:
            return False

    def kill(self) -> None:
        """As a crash would end it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """The server, and every training that it left behind."""
        self.kill()
        for state in self.workspace.glob(".simpletuner/jobs/*/state.json"):
            if not (state.parent / "exit.json").exists():
                kill_process_group(int(json.loads(state.read_text())["pid"]))

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        headers = {"content-type": "application/json"} if body is not None else {}
        with closing(
            http.client.HTTPConnection("localhost", self.port, timeout=TIMEOUT_S)
        ) as connection:
            sent = None if body is None else json.dumps(body)
            connection.request(method, f"/api/v1/{path}", sent, headers)
            answer = connection.getresponse()
            text = answer.read()
        return answer.status, json.loads(text) if text else None

    def request_ok(self, method: str, path: str, body: Any = None) -> Any:
        status, answer = self.request(method, path, body)
        assert status < 300, (status, answer)
        return answer

    def make_dataset(self, name: str, count: int = 4, captions: bool = True) -> Path:
        """A dataset of discs; every caption says its number."""
        folder = self.workspace / "datasets" / name
        folder.mkdir(parents=True)
        for at in range(count):
            image = Image.new("RGB", (96 + 16 * (at % 3), 96), (30, 60, 40 + at % 200))
            ImageDraw.Draw(image).ellipse((16, 16, 80, 80), fill=(220, 40 * (at % 6), 90))
            image.save(folder / f"disc-{at:04d}.png")
            if captions:
                (folder / f"disc-{at:04d}.txt").write_text(f"disc number {at}\n")
        return folder

    def configure_fake_trainer(self, **fake: str) -> None:
        """How fake trainings that start from now on behave: FAKE_* of the fake trainer."""
        (self.workspace / "fake.json").write_text(json.dumps(fake))

    def create_draft(self, name: str, **config: Any) -> Any:
        folder = self.workspace / "datasets" / "discs"
        if not folder.exists():
            self.make_dataset("discs")
        sets = [{"id": "discs", "type": "local", "instance_data_dir": str(folder)}]
        wanted = {"model_flavour": "nano", "device": "cpu", **config}
        return self.request_ok("POST", "drafts", {"name": name, "config": wanted, "datasets": sets})

    def enqueue(self, name: str, **config: Any) -> Any:
        return self.request_ok("POST", "jobs", {"draft": self.create_draft(name, **config)["id"]})

    def run_state(self, run: str) -> str:
        return str(self.request_ok("GET", f"runs/{run}")["summary"]["state"])

    def wait_for_state(self, run: str, *states: str) -> None:
        wait_until(lambda: self.run_state(run) in states, f"{run} is {states}")

    def run_folder(self, run: str) -> Path:
        return self.workspace / self.request_ok("GET", f"runs/{run}")["summary"]["path"]

    def read_events(self, run: str) -> list[dict[str, Any]]:
        """The run's events, as they lie in its folder."""
        text = (self.run_folder(run) / "events.jsonl").read_text()
        whole = text.rpartition("\n")[0]  # the last line may be half there
        return [json.loads(line) for line in whole.splitlines()]


def wait_until(true: Callable[[], object], what: str, every_s: float = 0.1) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(every_s)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def kill_process_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(os.getpgid(pid), signal.SIGKILL)
