"""Starts what waits when its devices are free, sees to it that what should stop does, and tells how it ended.

Everything is read from the folders at every look, so a server that starts takes over where another left off.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from simpletuner.config.catalog import catalog
from simpletuner.config.environment import PREFIX, SERVER_TOKEN, process_environment
from simpletuner.errors import SimpleTunerError
from simpletuner.server.jobfolder import JobFolder
from simpletuner.server.jobs import Jobs
from simpletuner.server.runs import held
from simpletuner.server.states import ENDED
from simpletuner.server.wire.system import Device

LOOK_S = 0.5
TERM_S = 20.0
# A full disk, or a folder by another hand: the next look may fare better.
TROUBLE = (OSError, sqlite3.Error, SimpleTunerError, ValueError, KeyError, TypeError)
VISIBLE = "CUDA_VISIBLE_DEVICES"  # heeded on ROCm too


def device_sets(found: Sequence[Device], environ: Mapping[str, str]) -> tuple[str, ...]:
    """What one job at a time may have: each GPU that this server may use; () where there is none."""
    cards = [device for device in found if device.kind in ("cuda", "rocm")]
    if not cards:
        return tuple(device.kind for device in found if device.kind == "mps")
    given = environ.get(VISIBLE)
    names = [str(at) for at in range(len(cards))] if given is None else given.split(",")
    return tuple(f"cuda:{name.strip()}" for name in names if name.strip() not in ("", "-1"))


def environment_of(devices: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Of a job: its configuration is frozen, so no variable of an option reaches it; nor do the server's
    token and modules that lie in the workspace.
    """
    ours = {SERVER_TOKEN, *(f"{PREFIX}{name.upper()}" for name in catalog())}
    kept = {name: value for name, value in environ.items() if name not in ours}
    kept |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    return kept | {VISIBLE: devices.partition(":")[2]} if devices.startswith("cuda:") else kept


class Supervisor:
    """One thread. Of several servers in a workspace only the first acts; when it ends, another does.

    devices: asked once, as it costs a process. grace_s: how long a training may take to save and leave.
    """

    def __init__(self, jobs: Jobs, devices: Callable[[], Sequence[Device]], grace_s: float = 120.0) -> None:
        self._jobs, self._devices, self._grace_s = jobs, devices, grace_s
        self._sets: tuple[str, ...] | None = None
        self._runners: list[subprocess.Popen[bytes]] = []
        self._told: dict[str, tuple[list[str], float]] = {}  # job -> what was sent, the last when
        self._lock: int | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """What runs goes on without this server."""
        self._closing.set()
        self._jobs.changed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _watch(self) -> None:
        said = ""
        while not self._closing.is_set():
            self._jobs.changed.clear()
            try:
                self.look()
            except TROUBLE as error:
                if str(error) != said:
                    said = str(error)
                    print(f"jobs: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self._jobs.changed.wait(LOOK_S)

    def look(self) -> None:
        """One round over all jobs. Raises the last trouble with one of them, when all have had their turn."""
        if not self._acts():
            return
        self._runners = [runner for runner in self._runners if runner.poll() is None]
        busy: list[str] = []
        trouble: Exception | None = None
        for folder in self._jobs.unsettled():
            try:
                busy += self._tend(folder)
            except TROUBLE as error:
                trouble = error
        if not self._jobs.index.order().paused:
            self._launch_all(busy)
        if trouble is not None:
            raise trouble

    def _tend(self, folder: JobFolder) -> list[str]:
        """What it keeps busy."""
        work = folder.work()
        if work is None or folder.state() in ENDED:
            self._jobs.settle(folder)
            return []
        asked = folder.asked()
        if asked is not None:
            with suppress(OSError):  # the device is taken all the same
                self._press(folder, asked, Path(work.run_dir) if work.run_dir else None)
        return [work.devices]

    def _acts(self) -> bool:
        if self._lock is None:
            self._jobs.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._jobs.folder / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                return False
            self._lock = descriptor
        return True

    def _press(self, folder: JobFolder, asked: dict[str, Any], run_dir: Path | None) -> None:
        """Ask, then SIGTERM, then SIGKILL; each once, whichever server: a second signal means "at once".

        It has its time to save after each by this process' own clock, which a laptop's sleep does not move.
        """
        sent, since = self._told.setdefault(folder.id, (asked["sent"], time.monotonic()))
        waited = time.monotonic() - since
        if "SIGKILL" in sent:
            return
        if asked["insist"] or ("SIGTERM" in sent and waited > min(self._grace_s, TERM_S)):
            self._send(folder, asked, signal.SIGKILL)
        elif waited > self._grace_s and sent and "SIGTERM" not in sent:
            self._send(folder, asked, signal.SIGTERM)
        elif run_dir is not None and held(run_dir / "run.lock"):
            # Looked at again: a training that begins in that instant sweeps its control/ first.
            if sent in ([], ["control/stop"]) and not (run_dir / "control" / "stop").exists():
                self._jobs.place.below(run_dir, "control/stop").touch()
            if not sent:
                self._sent(folder, asked, "control/stop")
        elif not sent:
            self._send(folder, asked, signal.SIGINT)

    def _send(self, folder: JobFolder, asked: dict[str, Any], number: signal.Signals) -> None:
        if folder.signal(number):
            self._sent(folder, asked, number.name)

    def _sent(self, folder: JobFolder, asked: dict[str, Any], what: str) -> None:
        """Remembered here too: a full disk keeps nothing."""
        sent = [*self._told[folder.id][0], what]
        self._told[folder.id] = sent, time.monotonic()
        folder.sent({**asked, "sent": sent})

    def _launch_all(self, busy: list[str]) -> None:
        waiting = self._jobs.waiting()
        if waiting and self._sets is None:
            self._sets = device_sets(self._devices(), process_environment())
        if waiting:  # a run that was started by hand says nothing of its device: it has the first
            busy += (self._sets or ("cpu",))[: self._jobs.elsewhere()]
        for folder in waiting:
            work = folder.work()
            if work is None:
                continue
            wanted = ("cpu",) if work.devices == "cpu" or not self._sets else self._sets
            free = next((one for one in wanted if one not in busy), None)
            if free is None or (work.run_dir and held(Path(work.run_dir) / "run.lock")):
                continue
            busy.append(free)
            self._launch(folder, free)

    def _launch(self, folder: JobFolder, devices: str) -> None:
        with self._jobs.lock:  # nobody withdraws it meanwhile
            work = folder.work()
            if work is None:
                return
            folder.write_work(replace(work, devices=devices))
            lock = folder.take_lock()
        try:
            with (folder.path / "output.log").open("ab") as log, suppress(OSError):
                runner = subprocess.Popen(
                    [sys.executable, "-m", "simpletuner.server.runner", str(folder.path), str(lock)],
                    cwd=work.cwd, env=environment_of(devices, process_environment()),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,),
                    start_new_session=True,
                )  # fmt: skip
                self._runners.append(runner)
        finally:
            os.close(lock)
