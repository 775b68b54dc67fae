"""What the pages cost with 1,000 runs and a dataset of 10,000 images: CPU, memory, bytes.

    python -m benchmarks.pages [--runs 1000] [--images 10000] [--home FOLDER]

Makes the runs and the images, starts `simpletuner server` and opens the pages in Chromium (needs
the extra test and a browser). Prints the table of benchmarks/results/pages.md. CPU seconds are those
of the processes (/proc and Chromium's SystemInfo), which other work on the machine changes little.
--home: where the workspace is made or was made, instead of a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, CDPSession, sync_playwright

from simpletuner.events import event_types
from simpletuner.events.event_log import event_to_dict

PORT = 8917
ORIGIN = f"http://127.0.0.1:{PORT}"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
STEPS = 200
START_T = 1_790_000_000.0
IDLE_S = 20.0
TICKS = os.sysconf("SC_CLK_TCK")


def write_run(folder: Path, number: int) -> None:
    """Write a run that is done, as its training would have left it."""
    folder.mkdir(parents=True)
    t = START_T + 1000 * number
    events: list[event_types.Event] = [
        event_types.StageStarted("scan", 20, "images"),
        event_types.StageCompleted("scan", 20, 0.5),
        event_types.RunStarted("0.2.0", str(folder), "chroma nano", "cpu", STEPS, 0),
    ]
    for step in range(1, STEPS + 1):
        loss = 0.4 + 1 / (step + number % 7)
        events.append(event_types.StepCompleted(step, STEPS, step // 10, loss, 1e-4, 0.1, 0.7, 4))
    lines = (json.dumps(event_to_dict(event, t + at)) for at, event in enumerate(events))
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text(json.dumps({"max_train_steps": STEPS}))
    record = {"exit_code": 0, "status": "done", "step": STEPS, "message": "", "t": t + 300}
    (folder / "exit.json").write_text(json.dumps(record))


def make_workspace(workspace: Path, runs: int, images: int) -> None:
    for number in range(runs):
        write_run(workspace / "output" / f"run-{number:04}", number)
    folder = workspace / "datasets" / "many"
    folder.mkdir(parents=True)
    for number in range(images):
        color = (number % 256, number // 256, 90)
        Image.new("RGB", (96, 96), color).save(folder / f"{number:06}.png", compress_level=1)
        (folder / f"{number:06}.txt").write_text(f"picture number {number}, red, round\n")


class Server:
    """`simpletuner server` as a process."""

    def __init__(self, workspace: Path) -> None:
        command = [sys.executable, "-m", "simpletuner", "server"]
        command += ["--workspace", str(workspace), "--port", str(PORT)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while not self.is_ready():
            if self.process.poll() is not None:
                raise SystemExit("the server has ended")
            time.sleep(0.02)
        self.ready_cpu_s = self.cpu_s()

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{ORIGIN}/", timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.URLError:
            return False

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident_mb(self, name: str = "VmRSS") -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024 / 1e6

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def renderer_cpu_s(browser: Browser) -> float:
    """Return the CPU seconds of all renderer processes since they started."""
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    return sum(float(entry["cpuTime"]) for entry in processes if entry["type"] == "renderer")


class Traffic:
    """Bytes on the wire of one page, from Chromium's network events."""

    def __init__(self, session: CDPSession) -> None:
        self.http_bytes = 0
        self.socket_bytes = 0
        session.on("Network.loadingFinished", self._add_http)
        session.on("Network.webSocketFrameReceived", self._add_frame)
        session.send("Network.enable")

    def _add_http(self, event: dict[str, Any]) -> None:
        self.http_bytes += int(event["encodedDataLength"])

    def _add_frame(self, event: dict[str, Any]) -> None:
        self.socket_bytes += len(event["response"]["payloadData"].encode())


def open_page(browser: Browser, address: str, ready: str) -> dict[str, float]:
    """Open a page in a new context until `ready` is visible; return what it cost.

    The CPU time is that of all renderers until 2 s after that, when they are at rest again.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US")
    page = context.new_page()
    traffic = Traffic(context.new_cdp_session(page))
    before, started = renderer_cpu_s(browser), time.perf_counter()
    page.goto(f"{ORIGIN}/{address}")
    page.locator(ready).first.wait_for()
    wall = time.perf_counter() - started
    page.wait_for_timeout(2000)
    cost: dict[str, float] = {
        "cpu_s": renderer_cpu_s(browser) - before,
        "wall_s": wall,
        "http_kb": traffic.http_bytes / 1000,
        "nodes": page.evaluate("document.querySelectorAll('*').length"),
        "socket_kb": traffic.socket_bytes / 1000,
    }
    traffic.socket_bytes = 0
    page.wait_for_timeout(1000 * IDLE_S)
    cost["idle_kb_per_s"] = traffic.socket_bytes / 1000 / IDLE_S
    context.close()
    return cost


def measure(workspace: Path) -> dict[str, Any]:
    """Return all figures."""
    figures: dict[str, Any] = {}
    server = Server(workspace)
    figures["ready_cpu_s"] = server.ready_cpu_s
    try:
        with sync_playwright() as player:
            path = next(filter(None, map(shutil.which, BROWSERS)))
            browser = player.chromium.launch(executable_path=path, args=["--no-sandbox"])
            figures["runs"] = open_page(browser, "#/runs", "main li")
            figures["dataset"] = open_page(browser, "#/datasets/many", "main article img")
            figures["runs_again"] = open_page(browser, "#/runs", "main li")
            browser.close()
        figures["server_mb"] = server.resident_mb()
        figures["server_peak_mb"] = server.resident_mb("VmHWM")
        idle = server.cpu_s()
        time.sleep(IDLE_S)
        figures["server_idle_cpu"] = (server.cpu_s() - idle) / IDLE_S
    finally:
        server.close()
    return figures


def as_table(figures: dict[str, Any]) -> str:
    runs, again, dataset = figures["runs"], figures["runs_again"], figures["dataset"]
    rows = [
        ("server ready, CPU of the process", "under 1 s", f"{figures['ready_cpu_s']:.2f} s"),
        ("server after the three pages, resident", "under 90 MB", f"{figures['server_mb']:.0f} MB"),
        ("server, peak", "-", f"{figures['server_peak_mb']:.0f} MB"),
        ("server with no page open, share of a core", "-", f"{figures['server_idle_cpu']:.1%}"),
        ("runs, first visit: bytes on the wire", "under 130 kB", f"{runs['http_kb']:.0f} kB"),
        ("runs, first visit: CPU of the renderer", "under 1 s", f"{runs['cpu_s']:.2f} s"),
        ("runs, second visit: CPU of the renderer", "under 1 s", f"{again['cpu_s']:.2f} s"),
        ("runs: elements of the document", "-", f"{runs['nodes']:.0f}"),
        ("runs: live connection, first seconds", "-", f"{runs['socket_kb']:.1f} kB"),
        (
            "runs: live connection at rest",
            "under 2 kB/s",
            f"{again['idle_kb_per_s']:.2f} kB/s",
        ),
        ("dataset: CPU of the renderer", "-", f"{dataset['cpu_s']:.2f} s"),
        ("dataset: elements of the document", "-", f"{dataset['nodes']:.0f}"),
    ]
    lines = ["| what | aim | measured |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {aim} | {value} |" for what, aim, value in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--home", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        workspace = arguments.home or Path(name) / "workspace"
        if not workspace.exists():
            make_workspace(workspace, arguments.runs, arguments.images)
        print(as_table(measure(workspace)))


if __name__ == "__main__":
    main()
