"""The supervisor, which launches queued jobs, enforces stop requests and records how jobs end.

It reads all state from the job folders in every round, so a new server continues where another one
ended. Two locks (flock) make that safe. `supervisor.lock` is held by the one server of a workspace
that acts; the kernel releases it when that server ends, in whatever way, and the next one takes
over. The runner lock of each job (see job_folder.py) prevents a second launch and shows which
devices are busy; it is held by the job itself, not by a server.
"""

from __future__ import annotations

import fcntl
import os
import signal
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
from simpletuner.server.file_reader import is_locked
from simpletuner.server.job_folder import JobFolder
from simpletuner.server.job_service import JobService
from simpletuner.server.job_states import ENDED_STATES
from simpletuner.server.queue_order import DeviceRequest, assign_devices
from simpletuner.server.schemas.system import DeviceInfo

POLL_INTERVAL_S = 0.5
TERM_GRACE_S = 20.0
# Caused by a full disk, or by folders that something else changes: the next round may succeed.
EXPECTED_ERRORS = (OSError, SimpleTunerError, ValueError, KeyError, TypeError)
CUDA_PREFIX = "cuda:"
VISIBLE_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"  # ROCm respects it as well


def job_devices(devices: Sequence[DeviceInfo], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the devices that one job at a time can use: each visible GPU, () if there is none."""
    gpus = [device for device in devices if device.kind in ("cuda", "rocm")]
    if not gpus:
        return tuple(device.kind for device in devices if device.kind == "mps")
    visible = environ.get(VISIBLE_DEVICES_VARIABLE)
    names = [str(at) for at in range(len(gpus))] if visible is None else visible.split(",")
    return tuple(CUDA_PREFIX + name.strip() for name in names if name.strip() not in ("", "-1"))


def join_devices(devices: Sequence[str]) -> str:
    """Return the devices of one job as one text: "cuda:0,2" for "cuda:0" and "cuda:2"."""
    if devices[0].startswith(CUDA_PREFIX):
        return CUDA_PREFIX + ",".join(device.removeprefix(CUDA_PREFIX) for device in devices)
    return ",".join(devices)


def split_devices(text: str) -> list[str]:
    """Return the devices that join_devices has joined."""
    if text.startswith(CUDA_PREFIX):
        return [CUDA_PREFIX + name for name in text.removeprefix(CUDA_PREFIX).split(",")]
    return [text]


def job_environment(devices: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job.

    It has no variable that sets an option, because the configuration of the job is fixed, and no
    server token. PYTHONSAFEPATH keeps modules in the workspace from being imported.
    """
    option_variables = {f"{VARIABLE_PREFIX}{name.upper()}" for name in all_options()}
    removed = {SERVER_TOKEN_VARIABLE, *option_variables}
    result = {name: value for name, value in environ.items() if name not in removed}
    result |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    if devices.startswith(CUDA_PREFIX):
        result[VISIBLE_DEVICES_VARIABLE] = devices.partition(":")[2]
    return result


class Supervisor:
    """The supervising thread.

    Of several servers in one workspace, only the first acts until it ends.

    devices: called once, because it starts a process. grace_s: seconds a training gets to save and
    exit. variables: returns further environment variables of a job.
    on_waiting: called in each round in which a job waits for a device.
    """

    def __init__(
        self,
        jobs: JobService,
        devices: Callable[[], Sequence[DeviceInfo]],
        grace_s: float = 120.0,
        variables: Callable[[], Mapping[str, str]] = dict,
        on_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._jobs = jobs
        self._devices = devices
        self._grace_s = grace_s
        self._variables = variables
        self._on_waiting = on_waiting
        self._job_devices: tuple[str, ...] | None = None
        self._runners: list[subprocess.Popen[bytes]] = []
        # Job -> the signals that were sent, and the time of the last one.
        self._stop_progress: dict[str, tuple[list[str], float]] = {}
        self._lock: int | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run_loop, name="supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop supervising. Running jobs continue without this server."""
        self._closing.set()
        self._jobs.changed_event.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _run_loop(self) -> None:
        last_error = ""
        while not self._closing.is_set():
            self._jobs.changed_event.clear()
            try:
                self.run_once()
            except EXPECTED_ERRORS as error:
                if str(error) != last_error:
                    last_error = str(error)
                    print(f"jobs: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self._jobs.changed_event.wait(POLL_INTERVAL_S)

    def run_once(self) -> None:
        """Supervise all jobs once.

        An error of one job is raised after the others had their turn.
        """
        if not self._acquire_leadership():
            return
        self._runners = [runner for runner in self._runners if runner.poll() is None]
        busy: list[str] = []
        job_error: Exception | None = None
        for folder in self._jobs.unfinalized_folders():
            try:
                busy += self._supervise_job(folder)
            except EXPECTED_ERRORS as error:
                job_error = error
        if not self._jobs.queue_order.read().paused:
            self._launch_queued(busy)
        if job_error is not None:
            raise job_error

    def _supervise_job(self, folder: JobFolder) -> list[str]:
        """Finalize an ended job, or enforce a stop request; return the devices it occupies."""
        spec = folder.read_spec()
        if spec is None or folder.read_state() in ENDED_STATES:
            self._jobs.finalize(folder)
            return []
        request = folder.read_stop_request()
        if request is not None:
            with suppress(OSError):  # the device is occupied in any case
                self._escalate_stop(folder, request, Path(spec.run_dir) if spec.run_dir else None)
        return split_devices(spec.devices)

    def _acquire_leadership(self) -> bool:
        """Return True if this server holds supervisor.lock, trying to take it if necessary."""
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
        self, folder: JobFolder, request: dict[str, Any], run_dir: Path | None
    ) -> None:
        """Request a stop politely, then send SIGTERM, then SIGKILL.

        Each is sent once, by whichever server, because a training takes a second signal as "exit at
        once". After each, the training gets time to save, measured by the monotonic clock, which
        stops while a laptop sleeps.
        """
        sent, since = self._stop_progress.setdefault(folder.id, (request["sent"], time.monotonic()))
        waited_s = time.monotonic() - since
        if "SIGKILL" in sent:
            return
        if request["insist"] or ("SIGTERM" in sent and waited_s > min(self._grace_s, TERM_GRACE_S)):
            self._send_signal(folder, request, signal.SIGKILL)
        elif waited_s > self._grace_s and sent and "SIGTERM" not in sent:
            self._send_signal(folder, request, signal.SIGTERM)
        elif run_dir is not None and is_locked(run_dir / "run.lock"):
            # Repeated in every round, because a training that is just starting clears control/
            # first.
            if sent in ([], ["control/stop"]) and not (run_dir / "control" / "stop").exists():
                self._jobs.workspace.resolve_below(run_dir, "control/stop").touch()
            if not sent:
                self._record_sent(folder, request, "control/stop")
        elif not sent:
            self._send_signal(folder, request, signal.SIGINT)

    def _send_signal(
        self, folder: JobFolder, request: dict[str, Any], number: signal.Signals
    ) -> None:
        if folder.send_signal(number):
            self._record_sent(folder, request, number.name)

    def _record_sent(self, folder: JobFolder, request: dict[str, Any], name: str) -> None:
        """Record a sent signal in memory and in stop.json, which fails on a full disk."""
        sent = [*self._stop_progress[folder.id][0], name]
        self._stop_progress[folder.id] = sent, time.monotonic()
        folder.write_stop_request({**request, "sent": sent})

    def _launch_queued(self, busy: list[str]) -> None:
        """Launch the queued jobs on the devices that are not in `busy`, see queue_order.py.

        A job whose run folder is still in use is left out, and reserves nothing. A job that asks
        for more GPUs than there are gets all of them, so that the training can say what is wrong.
        """
        queued = self._jobs.queued_folders()
        if not queued:
            return
        if self._job_devices is None:
            self._job_devices = job_devices(self._devices(), copy_process_environment())
        # The devices of a run that was started from a terminal are unknown: assume the first ones.
        busy += (self._job_devices or ("cpu",))[: self._jobs.count_external_processes()]
        folders = {folder.id: folder for folder in queued}
        requests: dict[bool, list[DeviceRequest]] = {True: [], False: []}
        for id, folder in folders.items():
            spec = folder.read_spec()
            if spec is None or (spec.run_dir and is_locked(Path(spec.run_dir) / "run.lock")):
                continue
            uses_cpu = spec.devices == "cpu" or not self._job_devices
            total = 1 if uses_cpu else len(self._job_devices)
            count = min(spec.device_count or total, total)
            requests[uses_cpu].append(DeviceRequest(id, count, spec.overtaken))
        for uses_cpu, waiting in requests.items():
            usable = ("cpu",) if uses_cpu else self._job_devices
            assignment = assign_devices(waiting, [name for name in usable if name not in busy])
            for id, times in assignment.overtaken.items():
                self._record_overtaken(folders[id], times)
            for id, devices in assignment.started.items():
                self._launch(folders[id], join_devices(devices))
            if len(assignment.started) < len(waiting):
                self._on_waiting()

    def _record_overtaken(self, folder: JobFolder, times: int) -> None:
        with self._jobs.lock:  # keeps a request from cancelling the job at the same time
            spec = folder.read_spec()
            if spec is not None:
                folder.write_spec(replace(spec, overtaken=times))

    def _launch(self, folder: JobFolder, devices: str) -> None:
        with self._jobs.lock:  # keeps a request from cancelling the job at the same time
            spec = folder.read_spec()
            if spec is None:
                return
            folder.write_spec(replace(spec, devices=devices))
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
                    cwd=spec.cwd,
                    env={
                        **job_environment(devices, copy_process_environment()),
                        **self._variables(),
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
                self._runners.append(runner)
        finally:
            os.close(lock)
