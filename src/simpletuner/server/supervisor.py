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

from simpletuner.config.environment import (
    SERVER_TOKEN_VARIABLE,
    VARIABLE_PREFIX,
    copy_process_environment,
)
from simpletuner.config.option_catalog import all_options
from simpletuner.errors import SimpleTunerError
from simpletuner.server.job_folder import JobFolder
from simpletuner.server.job_service import JobService
from simpletuner.server.job_states import ENDED_STATES
from simpletuner.server.run_service import is_locked
from simpletuner.server.schemas.system import DeviceInfo

POLL_INTERVAL_S = 0.5
TERM_GRACE_S = 20.0
# A full disk, or a folder by another hand: the next look may fare better.
EXPECTED_ERRORS = (OSError, sqlite3.Error, SimpleTunerError, ValueError, KeyError, TypeError)
VISIBLE_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"  # heeded on ROCm too


def device_sets(found: Sequence[DeviceInfo], environ: Mapping[str, str]) -> tuple[str, ...]:
    """What one job at a time may have: each GPU that this server may use; () where there is none."""
    cards = [device for device in found if device.kind in ("cuda", "rocm")]
    if not cards:
        return tuple(device.kind for device in found if device.kind == "mps")
    given = environ.get(VISIBLE_DEVICES_VARIABLE)
    names = [str(at) for at in range(len(cards))] if given is None else given.split(",")
    return tuple(f"cuda:{name.strip()}" for name in names if name.strip() not in ("", "-1"))


def job_environment(devices: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Of a job: its configuration is frozen, so no variable of an option reaches it; nor do the server's
    token and modules that lie in the workspace.
    """
    ours = {SERVER_TOKEN_VARIABLE, *(f"{VARIABLE_PREFIX}{name.upper()}" for name in all_options())}
    kept = {name: value for name, value in environ.items() if name not in ours}
    kept |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    return (
        kept | {VISIBLE_DEVICES_VARIABLE: devices.partition(":")[2]}
        if devices.startswith("cuda:")
        else kept
    )


class Supervisor:
    """One thread. Of several servers in a workspace only the first acts; when it ends, another does.

    devices: asked once, as it costs a process. grace_s: how long a training may take to save and leave.
    """

    def __init__(
        self, jobs: JobService, devices: Callable[[], Sequence[DeviceInfo]], grace_s: float = 120.0
    ) -> None:
        self._jobs, self._devices, self._grace_s = jobs, devices, grace_s
        self._device_sets: tuple[str, ...] | None = None
        self._runners: list[subprocess.Popen[bytes]] = []
        self._stop_progress: dict[
            str, tuple[list[str], float]
        ] = {}  # job -> what was sent, the last when
        self._lock: int | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run_loop, name="supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """What runs goes on without this server."""
        self._closing.set()
        self._jobs.changed_event.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _run_loop(self) -> None:
        said = ""
        while not self._closing.is_set():
            self._jobs.changed_event.clear()
            try:
                self.run_once()
            except EXPECTED_ERRORS as error:
                if str(error) != said:
                    said = str(error)
                    print(f"jobs: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self._jobs.changed_event.wait(POLL_INTERVAL_S)

    def run_once(self) -> None:
        """One round over all jobs. Raises the last trouble with one of them, when all have had their turn."""
        if not self._acquire_leadership():
            return
        self._runners = [runner for runner in self._runners if runner.poll() is None]
        busy: list[str] = []
        trouble: Exception | None = None
        for folder in self._jobs.unfinalized_folders():
            try:
                busy += self._supervise_job(folder)
            except EXPECTED_ERRORS as error:
                trouble = error
        if not self._jobs.index.read_order().paused:
            self._launch_queued(busy)
        if trouble is not None:
            raise trouble

    def _supervise_job(self, folder: JobFolder) -> list[str]:
        """What it keeps busy."""
        work = folder.read_spec()
        if work is None or folder.read_state() in ENDED_STATES:
            self._jobs.finalize(folder)
            return []
        asked = folder.read_stop_request()
        if asked is not None:
            with suppress(OSError):  # the device is taken all the same
                self._escalate_stop(folder, asked, Path(work.run_dir) if work.run_dir else None)
        return [work.devices]

    def _acquire_leadership(self) -> bool:
        if self._lock is None:
            self._jobs.jobs_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(
                self._jobs.jobs_dir / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o600
            )
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                return False
            self._lock = descriptor
        return True

    def _escalate_stop(
        self, folder: JobFolder, asked: dict[str, Any], run_dir: Path | None
    ) -> None:
        """Ask, then SIGTERM, then SIGKILL; each once, whichever server: a second signal means "at once".

        It has its time to save after each by this process' own clock, which a laptop's sleep does not move.
        """
        sent, since = self._stop_progress.setdefault(folder.id, (asked["sent"], time.monotonic()))
        waited = time.monotonic() - since
        if "SIGKILL" in sent:
            return
        if asked["insist"] or ("SIGTERM" in sent and waited > min(self._grace_s, TERM_GRACE_S)):
            self._send_signal(folder, asked, signal.SIGKILL)
        elif waited > self._grace_s and sent and "SIGTERM" not in sent:
            self._send_signal(folder, asked, signal.SIGTERM)
        elif run_dir is not None and is_locked(run_dir / "run.lock"):
            # Looked at again: a training that begins in that instant sweeps its control/ first.
            if sent in ([], ["control/stop"]) and not (run_dir / "control" / "stop").exists():
                self._jobs.workspace.resolve_below(run_dir, "control/stop").touch()
            if not sent:
                self._record_sent(folder, asked, "control/stop")
        elif not sent:
            self._send_signal(folder, asked, signal.SIGINT)

    def _send_signal(
        self, folder: JobFolder, asked: dict[str, Any], number: signal.Signals
    ) -> None:
        if folder.send_signal(number):
            self._record_sent(folder, asked, number.name)

    def _record_sent(self, folder: JobFolder, asked: dict[str, Any], what: str) -> None:
        """Remembered here too: a full disk keeps nothing."""
        sent = [*self._stop_progress[folder.id][0], what]
        self._stop_progress[folder.id] = sent, time.monotonic()
        folder.write_stop_request({**asked, "sent": sent})

    def _launch_queued(self, busy: list[str]) -> None:
        waiting = self._jobs.queued_folders()
        if waiting and self._device_sets is None:
            self._device_sets = device_sets(self._devices(), copy_process_environment())
        if waiting:  # a run that was started by hand says nothing of its device: it has the first
            busy += (self._device_sets or ("cpu",))[: self._jobs.count_external_runs()]
        for folder in waiting:
            work = folder.read_spec()
            if work is None:
                continue
            wanted = (
                ("cpu",) if work.devices == "cpu" or not self._device_sets else self._device_sets
            )
            free = next((one for one in wanted if one not in busy), None)
            if free is None or (work.run_dir and is_locked(Path(work.run_dir) / "run.lock")):
                continue
            busy.append(free)
            self._launch(folder, free)

    def _launch(self, folder: JobFolder, devices: str) -> None:
        with self._jobs.lock:  # nobody withdraws it meanwhile
            work = folder.read_spec()
            if work is None:
                return
            folder.write_spec(replace(work, devices=devices))
            lock = folder.take_lock()
        try:
            with (folder.path / "output.log").open("ab") as log, suppress(OSError):
                runner = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "simpletuner.server.runner",
                        str(folder.path),
                        str(lock),
                    ],
                    cwd=work.cwd,
                    env=job_environment(devices, copy_process_environment()),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
                self._runners.append(runner)
        finally:
            os.close(lock)
