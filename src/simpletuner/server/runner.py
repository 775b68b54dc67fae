"""`python -m simpletuner.server.runner FOLDER LOCK`: the process around one job, which outlives the server.

Leader of its own session and process group, with the training in the same group. LOCK: a descriptor of
runner.lock, locked by whoever started it; the runner and the training hold it as long as one of them lives.

    job.json    what to run: argv, cwd                  state.json  {pid, trainer, started_t}
    output.log  its output, output.1.log before that    exit.json   {code, signal, t}: how it ended
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from simpletuner.atomic_io import write_atomically

MAX_OUTPUT_BYTES = 20 * 2**20
POLL_INTERVAL_S = 2.0
NOT_STARTED_CODE = 127


class SignalRelay:
    """Passes signals on to the training; what comes before there is one is kept for it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._pending: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._child is None:
            self._pending.append(number)
        else:
            self._child.send_signal(number)

    def attach(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        for number in self._pending:
            child.send_signal(number)


def rotate_output(output: Path) -> None:
    """Begin anew when it is full; the part before stays beside it. The training appends, so it may go on."""
    if output.stat().st_size > MAX_OUTPUT_BYTES:
        shutil.copyfile(output, output.with_name("output.1.log"))
        os.truncate(output, 0)


def write_record(path: Path, **what: object) -> None:
    """On a full disk the training goes on without; the lock still says that it lives."""
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(what) + "\n")


def run_job(folder: Path, lock: int) -> None:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    output, relay = folder / "output.log", SignalRelay()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, relay)
    with output.open("ab") as log:
        try:
            child = subprocess.Popen(
                job["argv"],
                cwd=job["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
            )
        except OSError as error:
            log.write(f"{job['argv'][0]} cannot be started: {error}\n".encode())
            write_record(folder / "exit.json", code=NOT_STARTED_CODE, signal=None, t=time.time())
            return
    relay.attach(child)
    write_record(folder / "state.json", pid=os.getpid(), trainer=child.pid, started_t=time.time())
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(POLL_INTERVAL_S)
            break
        with contextlib.suppress(OSError):
            rotate_output(output)
    name = signal.Signals(-code).name if code < 0 else None
    write_record(folder / "exit.json", code=None if name else code, signal=name, t=time.time())


if __name__ == "__main__":
    run_job(Path(sys.argv[1]), int(sys.argv[2]))
