"""The process around one job: `python -m simpletuner.server.runner FOLDER LOCK`.

It outlives the server.

The runner exists because a server that crashed cannot wait for its child: only a parent learns the
exit code and the signal that ended a training, which distinguishes an out-of-memory kill from a
normal end. The protocol:

1. The supervisor starts the runner as leader of its own session and process group, so that closing
   the terminal or pressing Ctrl-C in it does not reach the training. The training is in the same
   group, so that one SIGKILL to the group ends both.
2. LOCK is the inherited descriptor of runner.lock, already locked (see job_folder.py). It is passed
   on to the training. It is never closed or unlocked explicitly: the kernel does that when both
   have ended.
3. Signal handlers are installed before the training starts. A signal that arrives in between is
   stored and forwarded afterwards, so no stop request is lost.
4. state.json publishes the process ids, after which signals can be sent to the job.
5. A training on several GPUs starts a process for each. They are in sessions of their own and end
   together with the training; those that do not are adopted by the runner, which kills them after
   ORPHAN_GRACE_S. So the devices are free when the lock is.
6. exit.json is written last and while the lock is still held.

    job.json    the command: argv, cwd                     state.json  {pid, trainer, started_t}
    output.log  the output, output.1.log before that       exit.json   {code, signal, t}
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
from simpletuner.server import process_tree

MAX_OUTPUT_BYTES = 20 * 2**20
POLL_INTERVAL_S = 2.0
NOT_STARTED_CODE = 127
ORPHAN_GRACE_S = 10.0  # for processes of a training that has ended
ORPHAN_POLL_S = 0.05


class SignalRelay:
    """Forwards signals to the training, and stores those that arrive before it has started."""

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
    """Move the output to output.1.log when it is full.

    The training opened the file in append mode, so it continues at the new end after the
    truncation.
    """
    if output.stat().st_size > MAX_OUTPUT_BYTES:
        shutil.copyfile(output, output.with_name("output.1.log"))
        os.truncate(output, 0)


def write_record(path: Path, **fields: object) -> None:
    """Write a JSON file. A full disk is ignored: the lock still shows that the job lives."""
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(fields) + "\n")


def end_orphans(grace_s: float = ORPHAN_GRACE_S) -> None:
    """Wait until the processes that the training left behind have ended; kill them after grace_s.

    A process that cannot be killed at once, because the kernel waits for its GPU, is waited for.
    """
    deadline = time.monotonic() + grace_s
    while orphans := process_tree.descendants([os.getpid()]):
        if time.monotonic() > deadline:
            process_tree.kill(orphans)
        time.sleep(ORPHAN_POLL_S)


def run_job(folder: Path, lock: int) -> None:
    """Run the command of job.json to its end.

    lock: a locked descriptor, inherited by the training.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    output = folder / "output.log"
    relay = SignalRelay()
    process_tree.become_subreaper()
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
    end_orphans()
    name = signal.Signals(-code).name if code < 0 else None
    write_record(folder / "exit.json", code=None if name else code, signal=name, t=time.time())


if __name__ == "__main__":
    run_job(Path(sys.argv[1]), int(sys.argv[2]))
