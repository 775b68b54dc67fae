"""Requests for images as files, which one process generates with its network kept in memory.

<folder>/<id>/command.json    the arguments of `simpletuner generate`
<folder>/<id>/state.json      running, done or failed, written by this process
<folder>/.stop                another job waits for the device: stop as soon as nothing is pending
<folder>/.closed              this process takes no further requests; written under .lock
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from simpletuner.atomic_io import write_atomically
from simpletuner.errors import SimpleTunerError

COMMAND_FILE = "command.json"
STATE_FILE = "state.json"
STOP_FILE = ".stop"
CLOSED_FILE = ".closed"
LOCK_FILE = ".lock"
IDLE_S = 180.0
POLL_S = 0.5


def serve_requests(
    folder: Path,
    generate: Callable[[Sequence[str]], object],
    idle_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Generate requests in their order until none has come for idle_s (IDLE_S); return how many.

    generate: called with the arguments of a request. An error that a user can fix fails its
    request only; any other ends the process.
    """
    with _locked(folder):
        for name in (CLOSED_FILE, STOP_FILE):
            (folder / name).unlink(missing_ok=True)
    idle_s = IDLE_S if idle_s is None else idle_s
    count, since = 0, clock()
    while True:
        path = next(pending_requests(folder), None)
        if path is not None:
            _run_request(path, generate)
            count, since = count + 1, clock()
        elif clock() - since > idle_s or (folder / STOP_FILE).exists():
            with _locked(folder):  # no request can come between this look and the end
                if next(pending_requests(folder), None) is None:
                    (folder / CLOSED_FILE).touch()
                    return count
        else:
            sleep(POLL_S)


def pending_requests(folder: Path) -> Iterator[Path]:
    """Yield the folders of requests that have not begun, the oldest first."""
    commands = [
        path for path in folder.glob(f"*/{COMMAND_FILE}") if not (path.parent / STATE_FILE).exists()
    ]
    for path in sorted(commands, key=lambda path: path.stat().st_mtime_ns):
        yield path.parent


def _run_request(path: Path, generate: Callable[[Sequence[str]], object]) -> None:
    _write_state(path, "running")
    try:
        generate(json.loads((path / COMMAND_FILE).read_text(encoding="utf-8")))
    except (SimpleTunerError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        _write_state(path, "failed", message)
    else:
        _write_state(path, "done")


def _write_state(path: Path, state: str, message: str = "") -> None:
    """Write the state of a request; one that was moved to the trash meanwhile has none."""
    with contextlib.suppress(FileNotFoundError):
        write_atomically(path / STATE_FILE, json.dumps({"state": state, "message": message}) + "\n")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
