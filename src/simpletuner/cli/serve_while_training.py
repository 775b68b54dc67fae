"""The web UI during a training: a server of its own, which ends with the training."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path

import click

from simpletuner.cli.server import bind_socket
from simpletuner.config.environment import copy_process_environment
from simpletuner.errors import ConfigError
from simpletuner.server.workspace import run_id

HOST, PORT = "127.0.0.1", 8001
READY_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 8.0


@contextlib.contextmanager
def serve_while_training(run_dir: Path, port: int = PORT) -> Iterator[str]:
    """Serve the working directory and this run folder; yield the address of the run's page.

    Raises ConfigError if the port is in use.
    """
    try:
        bind_socket(HOST, port).close()
    except ConfigError as error:
        raise ConfigError(
            f"--serve: port {port} is in use, perhaps by a server that already shows this run; see "
            f"http://localhost:{port}, or train without --serve"
        ) from error
    folder = Path(os.path.realpath(run_dir))
    with contextlib.suppress(OSError):  # the training reports it
        folder.mkdir(parents=True, exist_ok=True)
    url = f"http://localhost:{port}/#/runs/{run_id(folder)}"
    words = ["server", "--port", str(port), "--workspace", os.getcwd(), "--root", str(folder)]
    server = subprocess.Popen(
        [sys.executable, "-m", "simpletuner", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**copy_process_environment(), "PYTHONSAFEPATH": "1"},
    )
    click.echo(f"simpletuner: {url}")
    threading.Thread(target=open_browser_when_ready, args=(server, port, url), daemon=True).start()
    try:
        yield url
    finally:
        server.terminate()
        try:
            server.wait(SHUTDOWN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()


def open_browser_when_ready(server: subprocess.Popen[bytes], port: int, url: str) -> None:
    """Open the page when it answers, if there is a display.

    A text browser would take over the terminal.
    """
    variables = copy_process_environment()
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & variables.keys():
        return
    deadline = time.monotonic() + READY_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            webbrowser.open(url)
            return
        time.sleep(0.2)
