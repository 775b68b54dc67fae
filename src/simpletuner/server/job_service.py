"""The jobs of a workspace: queue, reorder, cancel, stop, resume. The supervisor launches them."""

from __future__ import annotations

import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from simpletuner.atomic_io import write_atomically
from simpletuner.server.api_errors import ApiError, abort
from simpletuner.server.config_validation import PROMPT_OPTIONS, validate_config
from simpletuner.server.draft_store import DraftStore
from simpletuner.server.file_reader import is_locked, read_json_object
from simpletuner.server.job_config import JobConfig, job_config_from_draft, job_config_from_run
from simpletuner.server.job_folder import JobFolder, JobSpec
from simpletuner.server.job_states import ACTIVE_STATES, ENDED_STATES, PHASES
from simpletuner.server.queue_order import QueueOrder, QueueOrderStore, queued_in_order
from simpletuner.server.run_artifacts import CHECKPOINT_NAME, checkpoint_step
from simpletuner.server.run_service import RunService
from simpletuner.server.schemas.configs import ConfigValidationResult
from simpletuner.server.schemas.jobs import Job, JobKind, JobRequest, Queue, QueueWrite
from simpletuner.server.schemas.runs import ResumeRequest, RunSummary
from simpletuner.server.settings import TRAIN_COMMAND
from simpletuner.server.workspace import Workspace, run_id

ControlFile = Literal["stop", "save", "validate"]  # files in control/ that a training watches
ID_PATTERN = re.compile(r"[0-9a-f]{12}")
MAX_ENDED_SHOWN = 200
CPU_KINDS: tuple[JobKind, ...] = ("export", "merge", "check", "inspect")
Validate = Callable[[Mapping[str, Any], Sequence[Any]], ConfigValidationResult]


class JobService:
    """The jobs of one workspace. Thread-safe.

    train_command: as in ServerSettings. validate: returns the problems of options and datasets;
    None for those of validate_config. require_devices: raises ApiError for a configuration that
    asks for more devices than there are. changed_event: set when the supervisor has something to
    do.
    """

    def __init__(
        self,
        workspace: Workspace,
        runs: RunService,
        drafts: DraftStore,
        train_command: tuple[str, ...] = TRAIN_COMMAND,
        validate: Validate | None = None,
        require_devices: Callable[[JobConfig], None] = lambda config: None,
    ) -> None:
        self.workspace = workspace
        self.jobs_dir = workspace.server_dir / "jobs"
        self.queue_order = QueueOrderStore(workspace.server_dir)
        self.changed_event = threading.Event()
        self.lock = threading.RLock()
        self._runs = runs
        self._drafts = drafts
        self._train_command = train_command
        self._require_devices = require_devices
        self._validate = validate or partial(validate_config, workspace)
        # The final messages of ended jobs: end.json is written once and never changes.
        self._ended_jobs: dict[str, Job] = {}
        runs.set_job_lookup(self.newest_by_run)

    def get_queue(self) -> Queue:
        order = self.queue_order.read()
        jobs = self._all_jobs()
        active = sorted(
            (job for job in jobs if job.state in ACTIVE_STATES), key=lambda job: job.queued_t
        )
        ended = (job for job in jobs if job.state in ENDED_STATES)
        newest = sorted(ended, key=lambda job: job.ended_t or 0.0, reverse=True)
        return Queue(
            paused=order.paused,
            continue_on_error=order.continue_on_error,
            jobs=[
                *queued_in_order(jobs, order),
                *map(self._with_phase, active),
                *newest[:MAX_ENDED_SHOWN],
            ],
        )

    def get_job(self, id: str) -> Job:
        """Return a job. Raises ApiError 404 for an unknown id."""
        folder = self._job_folder(id) if ID_PATTERN.fullmatch(id) else None
        job = folder.read_final_job() or folder.build_job() if folder else None
        return self._with_phase(job) if job else abort(404, "there is no such job")

    def newest_by_run(self) -> dict[str, Job]:
        """Return the newest job of each run, by run id.

        A job that has not ended is the newest even if the clock was set back.
        """
        jobs = sorted(
            self._all_jobs(), key=lambda job: (job.state not in ENDED_STATES, job.queued_t)
        )
        return {job.run: job for job in jobs if job.run}

    def ids_of_run(self, run: str) -> list[str]:
        """Return the ids of all jobs of a run."""
        return [job.id for job in self._all_jobs() if job.run == run]

    def count_external_processes(self) -> int:
        """Count the processes of the active runs that were not started by a job."""
        own_runs = {run for run, job in self.newest_by_run().items() if job.state in ACTIVE_STATES}
        return sum(
            self._runs.process_count(run.id)
            for run in self._runs.summaries()
            if run.state in ACTIVE_STATES and run.id not in own_runs
        )

    def enqueue(self, request: JobRequest) -> Job:
        """Queue a job with a copy of the draft's current configuration."""
        draft = self._drafts.get(request.draft)
        problems = self._validate(draft.config, draft.datasets).problems
        if problems:
            raise ApiError(422, problems)
        config = job_config_from_draft(draft, self.workspace, request.kind == "train")
        return self._create_job(draft.name, request.kind, config, draft.id)

    def resume(self, run: str, request: ResumeRequest) -> Job:
        """Queue a run again with its last configuration.

        The message of the returned job lists the options that were omitted.
        """
        summary = self._runs.summary(run)
        last_job = self.newest_by_run().get(run)
        # A run that was stopped early has a job but no folder.
        run_dir = Path(last_job.run_dir) if last_job else self._require_run_dir(run)
        self._check_resume_request(run_dir, summary, request)
        job_dir = self.jobs_dir / last_job.id / "config" if last_job else run_dir
        config = job_config_from_run(run_dir, job_dir / "config.json", self.workspace, request)
        job = self._create_job(summary.name, "train", config)
        return job.model_copy(update={"message": "; ".join(config.omitted_options)})

    def _check_resume_request(
        self, run_dir: Path, summary: RunSummary, request: ResumeRequest
    ) -> None:
        """Raise ApiError 422 for an unknown checkpoint or a length that leaves no steps."""
        checkpoint, steps = request.checkpoint, request.max_train_steps
        if checkpoint is not None and not self._has_checkpoint(run_dir, checkpoint):
            abort(422, f"the run has no checkpoint {checkpoint}", "checkpoint")
        folders = [run_dir / checkpoint] if checkpoint else run_dir.glob("checkpoint-*")
        start_step = max((0, *map(checkpoint_step, folders)))
        if steps is not None and steps < max(1, start_step):
            abort(
                422,
                f"the checkpoint is at step {start_step}; max_train_steps must not be lower",
                "max_train_steps",
            )
        is_longer = steps is not None and steps > summary.step
        if summary.state == "done" and checkpoint is None and not is_longer:
            message = f"the run is done at step {summary.step}; max_train_steps must be higher"
            abort(422, message, "max_train_steps")

    def cancel(self, id: str) -> None:
        """Move a queued job, or one that ended without a run folder, to the trash.

        A dry run or a tool that is active is killed: it has nothing to save.
        """
        with self.lock:
            job = self.get_job(id)
            if job.state in ACTIVE_STATES and job.kind != "train":
                self._request_stop(self._job_folder(id), insist=True)
                return
            if job.state in ACTIVE_STATES:
                abort(409, "this job is active; stop its run instead of cancelling the job")
            if job.state in ENDED_STATES and job.begun:
                abort(409, "this job has a run folder; delete that folder to remove the run")
            os.rename(self.jobs_dir / id, self.workspace.make_trash_folder() / f"job-{id}")
            order = self.queue_order.read()
            self._write_order(replace(order, jobs=tuple(job for job in order.jobs if job != id)))

    def update_queue(self, write: QueueWrite) -> Queue:
        """Change the flags or the order.

        Raises ApiError 409 if the set of queued jobs has changed.
        """
        with self.lock:
            changes = write.model_dump(exclude={"order"}, exclude_none=True)
            if write.order is not None:
                if sorted(write.order) != sorted(folder.id for folder in self.queued_folders()):
                    abort(409, "the queue has changed in the meantime; reload it", "order")
                changes["jobs"] = tuple(write.order)
            self._write_order(replace(self.queue_order.read(), **changes))
        return self.get_queue()

    def stop(self, run: str, insist: bool) -> None:
        """Ask the run to save a checkpoint and exit. `insist`: kill it now instead."""
        job = self.newest_by_run().get(run)
        if job is not None and job.state in ACTIVE_STATES:
            self._request_stop(self._job_folder(job.id), insist)
        elif job is not None and job.state == "queued":
            abort(409, "the run is queued; remove its job from the queue instead")
        elif insist:
            abort(
                409, "this run was started from a terminal: kill it there, or let it save and exit"
            )
        else:
            self.request_control(run, "stop")

    def _request_stop(self, folder: JobFolder, insist: bool) -> None:
        try:
            folder.request_stop(insist)
        except (
            OSError
        ):  # the request cannot be stored on a full disk: send the signal directly, once
            if not folder.send_signal(signal.SIGKILL if insist else signal.SIGINT):
                raise
        self.changed_event.set()

    def request_control(self, run: str, control: ControlFile) -> None:
        """Create a file in control/ that the training watches.

        Raises ApiError 409 if it is not running.
        """
        run_dir = self._require_run_dir(run)
        if not is_locked(run_dir / "run.lock"):
            abort(409, "the run is not running")
        options = read_json_object(run_dir / "config.json") or {}
        # A config.json without any of these options is of an older version.
        has_prompts = any(options.get(name) for name in PROMPT_OPTIONS) or not any(
            name in options for name in PROMPT_OPTIONS
        )
        if control == "validate" and options.get("validation_disable"):
            abort(409, "no samples to generate: validation_disable is set")
        if control == "validate" and not has_prompts:
            abort(409, "no samples to generate: this run has no validation prompts")
        self.workspace.resolve_below(run_dir, f"control/{control}").touch()

    def queued_folders(self) -> list[JobFolder]:
        """Return the folders of the queued jobs, in order."""
        return [
            self._job_folder(job.id)
            for job in queued_in_order(self._open_jobs(), self.queue_order.read())
        ]

    def unfinalized_folders(self) -> list[JobFolder]:
        """Return the folders of the launched jobs that have no end.json yet."""
        return [self._job_folder(job.id) for job in self._open_jobs() if job.state != "queued"]

    def finalize(self, folder: JobFolder) -> None:
        """Write the end.json of an ended job.

        A failure pauses the queue unless continue_on_error is set.
        """
        with self.lock:
            job = folder.build_job()
            if job is None or job.state not in ENDED_STATES:
                return
            write_atomically(folder.path / "end.json", job.model_dump_json(indent=1) + "\n")
            self._ended_jobs[folder.id] = job
            order = self.queue_order.read()
            failed = job.state in ("failed", "lost") and job.kind == "train"
            if failed and not order.continue_on_error and self.queued_folders():
                self._write_order(replace(order, paused=True))

    def _create_job(
        self, name: str, kind: Literal["train", "rehearse"], config: JobConfig, draft: str = ""
    ) -> Job:
        dry_run = kind == "rehearse"
        uses_cpu = dry_run or config.config.get("device") == "cpu"
        run = run_id(config.run_dir)
        if not dry_run:
            self._require_devices(config)  # before the lock: the first call takes seconds
        with self.lock:
            if not dry_run:
                self._require_run_dir_free(config.run_dir, run)
            folder = self._job_folder(secrets.token_hex(6))
            config_path = config.write(folder.path / "config")
            spec = JobSpec(
                name=name,
                kind=kind,
                argv=(
                    *self._train_command,
                    "--config",
                    str(config_path),
                    *(["--rehearse"] if dry_run else []),
                ),
                cwd=str(self.workspace.root),
                run_dir="" if dry_run else str(config.run_dir),
                run="" if dry_run else run,
                devices="cpu" if uses_cpu else "gpu",
                queued_t=time.time(),
                device_count=1 if uses_cpu else config.device_count,
                draft=draft,
            )
            folder.write_spec(spec)
            order = self.queue_order.read()
            self._write_order(replace(order, jobs=(*order.jobs, folder.id)))
        return self.get_job(folder.id)

    def enqueue_command(
        self, kind: JobKind, name: str, argv: Sequence[str], cwd: Path | None = None
    ) -> Job:
        """Queue a command of this program that is not a training.

        A check, an export or a merge uses the CPU; others wait for a device.
        """
        with self.lock:
            folder = self._job_folder(secrets.token_hex(6))
            folder.path.mkdir(parents=True)
            spec = JobSpec(
                name=name,
                kind=kind,
                argv=tuple(argv),
                cwd=str(cwd or self.workspace.root),
                run_dir="",
                run="",
                devices="cpu" if kind in CPU_KINDS else "gpu",
                queued_t=time.time(),
            )
            folder.write_spec(spec)
            order = self.queue_order.read()
            self._write_order(replace(order, jobs=(*order.jobs, folder.id)))
        return self.get_job(folder.id)

    def _require_run_dir_free(self, run_dir: Path, run: str) -> None:
        """Raise ApiError 409 if a job or another training uses the run folder.

        A process whose run has ended may still be exiting; a new job can be queued, it waits for
        the device.
        """
        job = self.newest_by_run().get(run)
        if job is not None and job.state not in ENDED_STATES:
            exiting = job.started_t is not None and self._runs.summary(run).state in ENDED_STATES
            if not exiting:
                advice = "stop it, or choose another output_dir"
                abort(
                    409, f"{run_dir} already has a job that is {job.state}; {advice}", "output_dir"
                )
        if is_locked(run_dir / "run.lock"):
            abort(409, f"a training started from a terminal is using {run_dir}", "output_dir")

    def _write_order(self, order: QueueOrder) -> None:
        self.queue_order.write(order)
        self.changed_event.set()

    def _require_run_dir(self, run: str) -> Path:
        return (self._runs.find_folder(run) if ID_PATTERN.fullmatch(run) else None) or abort(
            404, "there is no such run"
        )

    def _has_checkpoint(self, run_dir: Path, name: str) -> bool:
        return (
            CHECKPOINT_NAME.fullmatch(name) is not None
            and self.workspace.resolve_below(run_dir, name).is_dir()
        )

    def _job_folder(self, id: str) -> JobFolder:
        return JobFolder(self.jobs_dir / id)

    def _job_ids(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.jobs_dir) if ID_PATTERN.fullmatch(name)]
        except FileNotFoundError:
            return []

    def _with_phase(self, job: Job) -> Job:
        """Refine the state "starting" by the phase that the run's events show.

        A run can have ended while its process is still exiting; its job then counts as running.
        """
        if job.state != "starting" or not job.run:
            return job
        state = self._runs.summary(job.run).state
        phase = "running" if state in ENDED_STATES else state
        return job.model_copy(update={"state": phase}) if phase in PHASES else job

    def _open_jobs(self) -> list[Job]:
        """Return the jobs that are queued, active, or ended but not finalized."""
        with self.lock:
            jobs = []
            ids = self._job_ids()
            self._ended_jobs = {id: self._ended_jobs[id] for id in ids if id in self._ended_jobs}
            for id in ids:
                if id in self._ended_jobs:
                    continue
                folder = self._job_folder(id)
                final_job = folder.read_final_job()
                if final_job is not None:
                    self._ended_jobs[id] = final_job
                elif (job := folder.build_job()) is not None:
                    jobs.append(job)
            return jobs

    def _all_jobs(self) -> list[Job]:
        with self.lock:
            return [*self._open_jobs(), *self._ended_jobs.values()]
