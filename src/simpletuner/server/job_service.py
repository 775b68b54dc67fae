"""The jobs of a workspace: queued, arranged, withdrawn, asked to stop. What starts them is the supervisor."""

from __future__ import annotations

import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from simpletuner.atomic_io import write_atomically
from simpletuner.server.api_errors import ApiError, abort
from simpletuner.server.config_validation import validate_config
from simpletuner.server.draft_service import DraftService
from simpletuner.server.job_config import JobConfig, job_config_from_draft, job_config_from_run
from simpletuner.server.job_folder import JobFolder, JobSpec
from simpletuner.server.job_index import JobIndex, QueueOrder
from simpletuner.server.job_states import ACTIVE_STATES, ENDED_STATES, PHASE_TRANSITIONS
from simpletuner.server.log_reader import read_json_object
from simpletuner.server.run_artifacts import CHECKPOINT_NAME, checkpoint_step
from simpletuner.server.run_service import RunService, is_locked
from simpletuner.server.schemas.jobs import Job, JobRequest, Queue, QueueWrite
from simpletuner.server.schemas.runs import ResumeRequest
from simpletuner.server.settings import TRAIN_COMMAND
from simpletuner.server.workspace import Workspace, run_id

ControlFile = Literal[
    "stop", "save", "validate"
]  # files in control/ by which a run is asked for something
ID_PATTERN = re.compile(r"[0-9a-f]{12}")
MAX_ENDED_SHOWN = 200


def queued_in_order(jobs: Iterable[Job], order: QueueOrder) -> list[Job]:
    """Those that wait; one that the order does not know comes last."""
    places = {id: place for place, id in enumerate(order.jobs)}
    waiting = [job for job in jobs if job.state == "queued"]
    return sorted(waiting, key=lambda job: (places.get(job.id, len(places)), job.queued_t))


class JobService:
    """trainer: as in Settings. changed: set when there is something to do for the supervisor."""

    def __init__(
        self,
        place: Workspace,
        runs: RunService,
        drafts: DraftService,
        trainer: tuple[str, ...] = TRAIN_COMMAND,
    ) -> None:
        self.workspace, self.jobs_dir = place, place.server_dir / "jobs"
        self.index, self.changed_event = JobIndex(place.server_dir), threading.Event()
        self._runs, self._drafts, self._train_command = runs, drafts, trainer
        runs.set_job_lookup(self.newest_by_run)
        self.lock = threading.RLock()

    def get_queue(self) -> Queue:
        order, jobs = self.index.read_order(), self._all_jobs()
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
        """404 for what is no job's id."""
        folder = self._job_folder(id) if ID_PATTERN.fullmatch(id) else None
        found = folder.read_final_job() or folder.build_job() if folder else None
        return self._with_phase(found) if found else abort(404, "there is no such job")

    def newest_by_run(self) -> dict[str, Job]:
        """The newest job of every run that has one; one that has not ended, whatever the clock said."""
        found = sorted(
            self._all_jobs(), key=lambda job: (job.state not in ENDED_STATES, job.queued_t)
        )
        return {job.run: job for job in found if job.run}

    def count_external_runs(self) -> int:
        """How many runs work in this workspace that no job here started."""
        mine = {run for run, job in self.newest_by_run().items() if job.state in ACTIVE_STATES}
        return sum(
            run.state in ACTIVE_STATES and run.id not in mine for run in self._runs.summaries()
        )

    def enqueue(self, ask: JobRequest) -> Job:
        """Freeze a draft as it is now."""
        draft = self._drafts.get(ask.draft)
        problems = validate_config(self.workspace, draft.config, draft.datasets).problems
        if problems:
            raise ApiError(422, problems)
        return self._create_job(
            draft.name, ask.kind, job_config_from_draft(draft, self.workspace, ask.kind == "train")
        )

    def resume(self, run: str, ask: ResumeRequest) -> Job:
        """Queue a run again with the configuration it had last; the job's message says what was left out."""
        summary, last = self._runs.summary(run), self.newest_by_run().get(run)
        run_dir = (
            Path(last.run_dir) if last else self._require_run_dir(run)
        )  # one that was stopped early has no folder
        if ask.checkpoint is not None and not self._has_checkpoint(run_dir, ask.checkpoint):
            abort(422, "the run has no checkpoint of that name", "checkpoint")
        begun = [run_dir / ask.checkpoint] if ask.checkpoint else run_dir.glob("checkpoint-*")
        begins = max((0, *map(checkpoint_step, begun)))
        if ask.max_train_steps is not None and ask.max_train_steps < max(1, begins):
            abort(
                422,
                f"the checkpoint is at step {begins}; max_train_steps is no less",
                "max_train_steps",
            )
        longer = ask.max_train_steps is not None and ask.max_train_steps > summary.step
        if summary.state == "done" and ask.checkpoint is None and not longer:
            what = f"the run is done at step {summary.step}: max_train_steps above that"
            abort(422, what, "max_train_steps")
        source = (
            self.jobs_dir / last.id / "config" / "config.json" if last else run_dir / "config.json"
        )
        frozen = job_config_from_run(
            run_dir, source, self.workspace, ask.max_train_steps, ask.checkpoint
        )
        added = self._create_job(summary.name, "train", frozen)
        return added.model_copy(update={"message": "; ".join(frozen.omitted_options)})

    def cancel(self, id: str) -> None:
        """Out of the queue, or out of the list where it ended without a run folder, into the trash. A
        rehearsal that was begun is ended: it has nothing to save.
        """
        with self.lock:
            job = self.get_job(id)
            if job.state in ACTIVE_STATES and job.kind == "rehearse":
                self._request_stop(self._job_folder(id), insist=True)
                return
            if job.state in ACTIVE_STATES:
                abort(409, "only a job that waits can be withdrawn; stop its run instead")
            if job.state in ENDED_STATES and job.begun:
                abort(409, "its run was begun: remove the run folder to be rid of it")
            os.rename(self.jobs_dir / id, self.workspace.make_trash_folder() / f"job-{id}")
            order = self.index.read_order()
            self._write_order(replace(order, jobs=tuple(job for job in order.jobs if job != id)))

    def update_queue(self, write: QueueWrite) -> Queue:
        """409 when the order is not of the jobs that wait now: somebody else was quicker."""
        with self.lock:
            changed = write.model_dump(exclude={"order"}, exclude_none=True)
            if write.order is not None:
                if sorted(write.order) != sorted(folder.id for folder in self.queued_folders()):
                    abort(409, "the queue has changed meanwhile; look again", "order")
                changed["jobs"] = tuple(write.order)
            self._write_order(replace(self.index.read_order(), **changed))
        return self.get_queue()

    def stop(self, run: str, insist: bool) -> None:
        """Ask the run to save and leave; insist: end it now."""
        last = self.newest_by_run().get(run)
        if last is not None and last.state in ACTIVE_STATES:
            self._request_stop(self._job_folder(last.id), insist)
        elif last is not None and last.state == "queued":
            abort(409, "the run waits in the queue: withdraw its job instead")
        elif insist:
            abort(409, "this run was started elsewhere: end it there, or let it save and leave")
        else:
            self.request_control(run, "stop")

    def _request_stop(self, folder: JobFolder, insist: bool) -> None:
        try:
            folder.request_stop(insist)
        except OSError:  # a full disk keeps no wish: say it at once, and once
            if not folder.send_signal(signal.SIGKILL if insist else signal.SIGINT):
                raise
        self.changed_event.set()

    def request_control(self, run: str, control: ControlFile) -> None:
        """Lay a file that the running process looks for. 409 when nothing runs there."""
        run_dir = self._require_run_dir(run)
        if not is_locked(run_dir / "run.lock"):
            abort(409, "the run is not running")
        options = read_json_object(run_dir / "config.json") or {}
        prompts = any(
            options.get(name, "unknown") for name in ("validation_prompt", "user_prompt_library")
        )
        if control == "validate" and (options.get("validation_disable") or not prompts):
            abort(409, "this run draws no pictures: it has no prompts, or validation_disable is on")
        self.workspace.resolve_below(run_dir, f"control/{control}").touch()

    def queued_folders(self) -> list[JobFolder]:
        """Those that could be started, in their order."""
        return [
            self._job_folder(job.id)
            for job in queued_in_order(self._open_jobs(), self.index.read_order())
        ]

    def unfinalized_folders(self) -> list[JobFolder]:
        """Those that were started and whose end has not been written down."""
        return [self._job_folder(job.id) for job in self._open_jobs() if job.state != "queued"]

    def finalize(self, folder: JobFolder) -> None:
        """Write down what an ended job came to. A failure holds those that wait, unless told otherwise."""
        with self.lock:
            ended = folder.build_job()
            if ended is None or ended.state not in ENDED_STATES:
                return
            write_atomically(folder.path / "end.json", ended.model_dump_json(indent=1) + "\n")
            self.index.write_ended_job(folder.id, ended.model_dump_json())
            order = self.index.read_order()
            failed = ended.state in ("failed", "lost") and ended.kind == "train"
            if failed and not order.continue_on_error and self.queued_folders():
                self._write_order(replace(order, paused=True))

    def _create_job(self, name: str, kind: Literal["train", "rehearse"], frozen: JobConfig) -> Job:
        rehearsal, run = kind == "rehearse", run_id(frozen.run_dir)
        with self.lock:
            if not rehearsal:
                self._require_run_dir_free(frozen.run_dir, run)
            folder = self._job_folder(secrets.token_hex(6))
            config = frozen.write(folder.path / "config")
            work = JobSpec(
                name=name,
                kind=kind,
                argv=(
                    *self._train_command,
                    "--config",
                    str(config),
                    *(["--rehearse"] if rehearsal else []),
                ),
                cwd=str(self.workspace.root),
                run_dir="" if rehearsal else str(frozen.run_dir),
                run="" if rehearsal else run,
                devices="cpu" if rehearsal or frozen.config.get("device") == "cpu" else "gpu",
                queued_t=time.time(),
            )
            folder.write_spec(work)
            order = self.index.read_order()
            self._write_order(replace(order, jobs=(*order.jobs, folder.id)))
        return self.get_job(folder.id)

    def _require_run_dir_free(self, run_dir: Path, run: str) -> None:
        """A process that has told how its run ended may still be leaving: the queue waits for its device."""
        last = self.newest_by_run().get(run)
        if last is not None and last.state not in ENDED_STATES:
            leaving = last.started_t is not None and self._runs.summary(run).state in ENDED_STATES
            if not leaving:
                what = (
                    f"already has a job that is {last.state}; stop it, or choose another output_dir"
                )
                abort(409, f"{run_dir} {what}", "output_dir")
        if is_locked(run_dir / "run.lock"):
            abort(409, f"a training that was started elsewhere works in {run_dir}", "output_dir")

    def _write_order(self, order: QueueOrder) -> None:
        self.index.write_order(order)
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
        """Nearer than "starting": by the run's events. One that has ended still has a process for a while."""
        if job.state != "starting" or not job.run:
            return job
        found = self._runs.summary(job.run).state
        phase = "running" if found in ENDED_STATES else found
        return job.model_copy(update={"state": phase}) if phase in PHASE_TRANSITIONS else job

    def _open_jobs(self) -> list[Job]:
        """Of all that wait, run, or ended without having been settled."""
        with self.lock:
            known = self.index.ended_jobs()
            found = []
            for id in self._job_ids():
                if id in known:
                    continue
                folder = self._job_folder(id)
                ended = folder.read_final_job()
                if ended is not None:
                    self.index.write_ended_job(id, ended.model_dump_json())
                elif (view := folder.build_job()) is not None:
                    found.append(view)
            return found

    def _all_jobs(self) -> list[Job]:
        with self.lock:
            living, here = self._open_jobs(), set(self._job_ids())
            ended = self.index.ended_jobs().items()
            return [*living, *(Job.model_validate_json(text) for id, text in ended if id in here)]
