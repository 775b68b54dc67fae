"""The folder of a job: what it runs, frozen; who holds it; how it ended. A job's state follows from it.

.simpletuner/jobs/<id>/
    job.json     the command, frozen            config/      what the training reads by --config
    runner.lock  there once it was started, locked while it lives
    state.json   its process group              stop.json    somebody asked it to stop
    exit.json    how the process ended          end.json     what it came to, said once
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from simpletuner.atomic_io import write_atomically
from simpletuner.errors import TrainingStopped
from simpletuner.server.failure_advice import FailureExplanation, explain_failure
from simpletuner.server.job_states import ENDED_STATES, ObservedJob, Outcome, derive_state
from simpletuner.server.log_reader import read_json_object, read_log_part
from simpletuner.server.run_service import is_locked
from simpletuner.server.schemas.base import JobState
from simpletuner.server.schemas.jobs import Job

MAX_OUTPUT_LINES = 40
MAX_OUTPUT_BYTES = 16384


@dataclass(frozen=True)
class JobSpec:
    """job.json. devices: "gpu" or "cpu" while it waits, then the set it runs on, "cuda:0". run_dir: "" for a
    rehearsal, which leaves nothing behind. queued_t: unix seconds.
    """

    name: str
    kind: Literal["train", "rehearse"]
    argv: tuple[str, ...]
    cwd: str
    run_dir: str
    run: str
    devices: str
    queued_t: float


class JobFolder:
    """One folder below jobs/."""

    def __init__(self, path: Path) -> None:
        self.path, self.id = path, path.name

    def read_spec(self) -> JobSpec | None:
        """None for a folder that is not whole: its server was killed while it wrote."""
        content = read_json_object(self.path / "job.json") or {}
        try:
            known = {field.name: content[field.name] for field in fields(JobSpec)}
            return JobSpec(**{**known, "argv": tuple(known["argv"])})
        except (KeyError, TypeError):
            return None

    def write_spec(self, work: JobSpec) -> None:
        write_atomically(self.path / "job.json", json.dumps(asdict(work), indent=1) + "\n")

    def take_lock(self) -> int:
        """A descriptor for the runner; the file has its name only when it is locked."""
        unnamed = self.path / ".runner.lock"
        descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(unnamed, self.path / "runner.lock")
        return descriptor

    @property
    def was_launched(self) -> bool:
        return (self.path / "runner.lock").exists()

    @property
    def is_alive(self) -> bool:
        return is_locked(self.path / "runner.lock")

    def read_stop_request(self) -> dict[str, Any] | None:
        """{insist, sent}: how the stop was asked for, and what was done about it since."""
        return read_json_object(self.path / "stop.json")

    def request_stop(self, insist: bool) -> None:
        self.write_stop_request({"sent": [], **(self.read_stop_request() or {}), "insist": insist})

    def write_stop_request(self, asked: dict[str, Any]) -> None:
        write_atomically(self.path / "stop.json", json.dumps(asked) + "\n")

    def send_signal(self, number: signal.Signals) -> bool:
        """To the training by way of its runner; SIGKILL to the whole group. False: not yet to be reached."""
        process = read_json_object(self.path / "state.json")
        if process is None or not self.is_alive:
            return False
        with contextlib.suppress(ProcessLookupError):
            if number != signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process["pid"], number)
                    return True
            os.killpg(process["pid"], number)
        return True

    def read_state(self) -> JobState:
        """While the training lives "starting": how far it has come is in its run folder."""
        work = self.read_spec()
        if not self.was_launched or work is None:
            return derive_state(ObservedJob())
        alive = self.is_alive  # before exit.json, which is written while the lock is held
        end = None if alive else self._outcome(work)
        return derive_state(
            ObservedJob(
                True, alive, stop_requested=self.read_stop_request() is not None, outcome=end
            )
        )

    def _started_t(self) -> float | None:
        return (read_json_object(self.path / "state.json") or {}).get("started_t")

    def _training_exit(self, work: JobSpec) -> dict[str, Any]:
        """What the training itself wrote of this end into its run folder."""
        told = (read_json_object(Path(work.run_dir) / "exit.json") if work.run_dir else None) or {}
        t = told.get("t")
        return (
            told
            if isinstance(t, (int, float)) and t >= (self._started_t() or work.queued_t)
            else {}
        )

    def _outcome(self, work: JobSpec) -> Outcome | None:
        exited, status = (
            read_json_object(self.path / "exit.json"),
            self._training_exit(work).get("status"),
        )
        if exited is None:  # the runner was killed; the training may have come to its own end
            return status if status in ("done", "stopped", "failed") else None
        if exited.get("code") in (0, TrainingStopped.exit_code):
            return "done" if exited["code"] == 0 else "stopped"
        # Interrupted while it is loaded, Python says so in many ways.
        return "failed" if self.read_stop_request() is None or status == "failed" else "stopped"

    def last_output_lines(self) -> list[str]:
        """The last of its output."""
        said = read_log_part(
            self.path / "output.log", -MAX_OUTPUT_BYTES, MAX_OUTPUT_BYTES
        ).text.rstrip()
        return (
            [line.rpartition("\r")[2] for line in said.split("\n")][-MAX_OUTPUT_LINES:]
            if said
            else []
        )

    def read_final_job(self) -> Job | None:
        """What was written down of its end; None while it was not, or by a version with other fields."""
        try:
            return Job.model_validate_json((self.path / "end.json").read_bytes())
        except (OSError, ValueError):
            return None

    def build_job(self) -> Job | None:
        """As the API tells of it. None for a folder that is not whole."""
        work = self.read_spec()
        if work is None:
            return None
        state = self.read_state()
        ended = state in ENDED_STATES
        exited = read_json_object(self.path / "exit.json") or {}
        lines = (
            self.last_output_lines()
            if ended or (work.kind == "rehearse" and state != "queued")
            else []
        )
        told = str(self._training_exit(work).get("message", "")) if ended else ""
        why = FailureExplanation(told, "")
        if state == "failed":
            why = explain_failure(exited.get("code"), exited.get("signal"), lines, told)
        elif state == "lost":
            lost = "the training vanished without a word: the computer went down, or everything was killed"
            why = FailureExplanation(lost, "Resume it: it goes on from its last checkpoint")
        return Job(
            id=self.id,
            run_dir=work.run_dir,
            run=work.run,
            name=work.name,
            kind=work.kind,
            state=state,
            devices=work.devices,
            queued_t=work.queued_t,
            started_t=self._started_t(),
            ended_t=exited.get("t", time.time()) if ended else None,
            exit_code=exited.get("code"),
            message=why.message,
            advice=why.advice,
            last_lines=lines,
            begun=bool(work.run_dir) and Path(work.run_dir, "run.lock").exists(),
        )
