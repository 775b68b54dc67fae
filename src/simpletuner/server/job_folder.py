"""The folder of a job: its command, its runner's lock, and how it ended.

The job's state follows from it.

.simpletuner/jobs/<id>/
    job.json     the command                    config/      the configuration passed by --config
    runner.lock  exists once the job was launched; locked while the runner or the training lives
    state.json   the process ids                stop.json    the request to stop
    exit.json    how the process ended          end.json     the final Job message, written once

The lock protocol. A job must be launched at most once, and every server must know whether it is
alive, also after a crash of the server, the runner or the whole machine. Process ids cannot answer
that: they are reused. An flock can: the kernel releases it exactly when the last process that holds
its descriptor has ended.

1. The supervisor creates `.runner.lock`, locks it, and only then renames it to `runner.lock`. So
   the file never exists unlocked before the launch: "exists" means launched, and "exists and is not
   locked" means ended. A server that crashes before the rename leaves the job queued.
2. The descriptor is inherited by the runner and by the training, and the supervisor closes its own
   copy. The lock is held while either of them lives, even if the runner alone is killed: then the
   GPU is still busy.
3. The runner writes exit.json while it still holds the lock. A reader therefore tests the lock
   first and reads exit.json afterwards; in the other order it could miss a file that was written in
   between and report an ended job as lost.
4. If the lock is free and there is no exit.json, the runner was killed. The training may still have
   written its own exit.json to the run folder; without one, the job is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from simpletuner.atomic_io import write_atomically
from simpletuner.errors import TrainingStopped
from simpletuner.server import process_tree
from simpletuner.server.failure_advice import FailureExplanation, explain_failure
from simpletuner.server.file_reader import is_locked, read_json_object, read_log_part
from simpletuner.server.job_states import ENDED_STATES, ObservedJob, Outcome, derive_state
from simpletuner.server.schemas.base import JobState
from simpletuner.server.schemas.jobs import Job, JobKind

MAX_OUTPUT_LINES = 40
MAX_OUTPUT_BYTES = 16384
LOST_MESSAGE = (
    "the process ended unexpectedly: the computer lost power, or all processes were killed"
)
LOST_ADVICE = "Resume the run: it continues from its last checkpoint"


@dataclass(frozen=True)
class JobSpec:
    """The content of job.json.

    devices: "gpu" or "cpu" while queued, then the devices it runs on, such as "cuda:0,1". run_dir,
    run: the run folder and its id, "" for a dry run, which keeps no files. queued_t: unix seconds.
    device_count: number of GPUs that it asks for, None for all. overtaken: how often a later job
    was started before it. draft: id of the draft that it was made from, "" for a resumed run.
    """

    name: str
    kind: JobKind
    argv: tuple[str, ...]
    cwd: str
    run_dir: str
    run: str
    devices: str
    queued_t: float
    device_count: int | None = 1
    overtaken: int = 0
    draft: str = ""


class JobFolder:
    """One folder below jobs/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name

    def read_spec(self) -> JobSpec | None:
        """Return the content of job.json, or None if the server was killed while writing it."""
        content = read_json_object(self.path / "job.json") or {}
        try:
            values = {
                field.name: content[field.name]
                for field in fields(JobSpec)
                if field.name in content or field.default is MISSING
            }
            return JobSpec(**{**values, "argv": tuple(values["argv"])})
        except (KeyError, TypeError):
            return None

    def write_spec(self, spec: JobSpec) -> None:
        write_atomically(self.path / "job.json", json.dumps(asdict(spec), indent=1) + "\n")

    def take_lock(self) -> int:
        """Create and lock runner.lock; return the descriptor, which the runner inherits."""
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
        """Return {`insist`, sent}: whether to kill at once, and the signals sent; or None."""
        return read_json_object(self.path / "stop.json")

    def request_stop(self, insist: bool) -> None:
        self.write_stop_request({"sent": [], **(self.read_stop_request() or {}), "insist": insist})

    def write_stop_request(self, request: dict[str, Any]) -> None:
        write_atomically(self.path / "stop.json", json.dumps(request) + "\n")

    def send_signal(self, number: signal.Signals) -> bool:
        """Signal the runner, which forwards it to the training; SIGKILL goes to all processes.

        The processes of a training on several GPUs have groups of their own, so they are found as
        descendants. Returns False if the job has no process yet, or has ended.
        """
        process = read_json_object(self.path / "state.json")
        if process is None or not self.is_alive:
            return False
        group = process["pid"]
        with contextlib.suppress(ProcessLookupError):
            if number != signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(group, number)
                    return True
            members = process_tree.group_members(group)
            descendants = process_tree.descendants(members)
            os.killpg(group, number)
            process_tree.kill(descendants)
        return True

    def read_state(self) -> JobState:
        """Return the state.

        The exact phase of a live training is only known from its run folder.
        """
        spec = self.read_spec()
        if not self.was_launched or spec is None:
            return derive_state(ObservedJob())
        alive = self.is_alive  # tested before reading exit.json: see the lock protocol above
        observed = ObservedJob(
            launched=True,
            alive=alive,
            stop_requested=self.read_stop_request() is not None,
            outcome=None if alive else self._outcome(spec),
        )
        return derive_state(observed)

    def _started_t(self) -> float | None:
        return (read_json_object(self.path / "state.json") or {}).get("started_t")

    def _training_exit(self, spec: JobSpec) -> dict[str, Any]:
        """Return the exit.json that this job's training wrote to the run folder, or {}."""
        path = Path(spec.run_dir) / "exit.json"
        content = (read_json_object(path) if spec.run_dir else None) or {}
        t = content.get("t")
        is_recent = isinstance(t, (int, float)) and t >= (self._started_t() or spec.queued_t)
        return content if is_recent else {}

    def _outcome(self, spec: JobSpec) -> Outcome | None:
        exit_record = read_json_object(self.path / "exit.json")
        status = self._training_exit(spec).get("status")
        if exit_record is None:  # the runner was killed; the training may have ended by itself
            return status if status in ("done", "stopped", "failed") else None
        if exit_record.get("code") in (0, TrainingStopped.exit_code):
            return "done" if exit_record["code"] == 0 else "stopped"
        # A Python program that is interrupted during its imports can end with various codes.
        return "failed" if self.read_stop_request() is None or status == "failed" else "stopped"

    def last_output_lines(self) -> list[str]:
        """Return the last lines of the output, without overwritten progress bars."""
        part = read_log_part(self.path / "output.log", -MAX_OUTPUT_BYTES, MAX_OUTPUT_BYTES)
        text = part.text.rstrip()
        if not text:
            return []
        return [line.rpartition("\r")[2] for line in text.split("\n")][-MAX_OUTPUT_LINES:]

    def read_final_job(self) -> Job | None:
        """Return the Job message in end.json, or None if it is missing or has other fields."""
        try:
            return Job.model_validate_json((self.path / "end.json").read_bytes())
        except (OSError, ValueError):
            return None

    def build_job(self) -> Job | None:
        """Build the Job message from the files. Returns None for an incomplete folder."""
        spec = self.read_spec()
        if spec is None:
            return None
        state = self.read_state()
        ended = state in ENDED_STATES
        exit_record = read_json_object(self.path / "exit.json") or {}
        shows_output = ended or (spec.kind != "train" and state != "queued")
        lines = self.last_output_lines() if shows_output else []
        explanation = self._explain_end(spec, state, exit_record, lines)
        return Job(
            id=self.id,
            run_dir=spec.run_dir,
            run=spec.run,
            draft=spec.draft,
            name=spec.name,
            kind=spec.kind,
            state=state,
            devices=spec.devices,
            device_count=spec.device_count,
            queued_t=spec.queued_t,
            started_t=self._started_t(),
            ended_t=exit_record.get("t", time.time()) if ended else None,
            exit_code=exit_record.get("code"),
            message=explanation.message,
            advice=explanation.advice,
            last_lines=lines,
            begun=bool(spec.run_dir) and Path(spec.run_dir, "run.lock").exists(),
        )

    def _explain_end(
        self, spec: JobSpec, state: JobState, exit_record: dict[str, Any], lines: list[str]
    ) -> FailureExplanation:
        """Return the message and the advice of an ended job, empty for others."""
        ended = state in ENDED_STATES
        message = str(self._training_exit(spec).get("message", "")) if ended else ""
        if state == "failed":
            code, signal_name = exit_record.get("code"), exit_record.get("signal")
            return explain_failure(code, signal_name, lines, message)
        if state == "lost":
            return FailureExplanation(LOST_MESSAGE, LOST_ADVICE)
        return FailureExplanation(message, "")
