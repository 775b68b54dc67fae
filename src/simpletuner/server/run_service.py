"""Runs: the folders of trainings, whoever started them, and the jobs that have no folder yet."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.config.option_catalog import all_options
from simpletuner.events.formatting import describe_event
from simpletuner.server import log_reader, run_artifacts
from simpletuner.server.api_errors import abort
from simpletuner.server.event_summary import MAX_NOTES, EventSummary, Phase
from simpletuner.server.job_states import ACTIVE_STATES, ENDED_STATES
from simpletuner.server.run_finder import RunFinder
from simpletuner.server.schemas.base import JobState
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.schemas.runs import RunDetail, RunImage, RunSummary
from simpletuner.server.workspace import Workspace, run_id

READ_BUDGET_S = 0.25  # of events that nobody has read yet, for one list of runs
WATCHED_FILES = ("events.jsonl", "exit.json", "run.lock", "control/stop")
STATE_OF_STATUS: Mapping[str, JobState] = {
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}  # of exit.json

FileStamp = tuple[int, int, int] | None


@dataclass
class CachedRun:
    """A run folder as it was when it was last looked at. held: a process works there. exit: what exit.json
    says.
    """

    path: Path
    event_summary: EventSummary
    file_stamps: tuple[FileStamp, ...] = ()
    is_locked: bool = False
    exit_record: dict[str, Any] | None = None

    @classmethod
    def for_folder(cls, path: Path) -> CachedRun:
        return cls(path, EventSummary(path / "events.jsonl"))

    @property
    def exit_t(self) -> float | None:
        t = self.exit_record.get("t") if self.exit_record else None
        return float(t) if isinstance(t, (int, float)) else None


class RunService:
    """Safe to use from several threads. Everything is derived from the folders at every look."""

    def __init__(self, place: Workspace) -> None:
        self.workspace = place
        self._finder = RunFinder(place)
        self._newest_jobs: Callable[[], Mapping[str, Job]] = dict
        self._job_run_dirs: dict[str, str] = {}
        self._runs: dict[str, CachedRun] = {}
        self._lock = threading.RLock()

    def set_job_lookup(self, by_run: Callable[[], Mapping[str, Job]]) -> None:
        """by_run: the newest job of every run that has one, by run id. Jobs are made after runs, which they
        ask about; this asks no runs.
        """
        self._newest_jobs = by_run

    def summaries(self) -> list[RunSummary]:
        """Newest first, those to come before all. Of long events that nobody has read yet the first answer
        may know a part only; the next one goes on.
        """
        jobs, deadline = self._jobs_by_run(), time.monotonic() + READ_BUDGET_S
        with self._lock:
            self._rescan()
            newest = sorted(
                self._runs.items(), key=lambda one: _last_changed_ns(one[1].path), reverse=True
            )
            found = [self._summarize(id, seen, jobs.get(id), deadline) for id, seen in newest]
            absent = (id for id in jobs if id not in self._runs)
            found += [
                _summary_without_folder(id, jobs[id]) for id in absent if not _was_deleted(jobs[id])
            ]
        return sorted(
            found, key=lambda run: (run.state == "queued", run.started_t or 0.0), reverse=True
        )

    def summary(self, id: str) -> RunSummary:
        """Raises Refused: 404 when there is no such run."""
        job = self._jobs_by_run().get(id)
        with self._lock:
            seen = self._find_run(id)
            if seen is not None:
                return self._summarize(id, seen, job, float("inf"))
        known = job is not None and not _was_deleted(job)
        return (
            _summary_without_folder(id, job)
            if known and job
            else abort(404, "there is no such run")
        )

    def find_folder(self, id: str) -> Path | None:
        """The folder of a run that has one."""
        if id not in self._runs:
            self._jobs_by_run()
        with self._lock:
            seen = self._find_run(id)
            return seen.path if seen else None

    def list_images(self, id: str) -> list[RunImage]:
        self.summary(id)
        with self._lock:
            return (
                run_artifacts.list_images(self._runs[id].event_summary.history)
                if id in self._runs
                else []
            )

    def detail(self, id: str) -> RunDetail:
        summary = self.summary(id)
        with self._lock:
            seen = self._runs.get(id) or CachedRun.for_folder(Path(summary.path))
            digest, started = seen.event_summary, seen.event_summary.history.start_event
            config, options = (
                log_reader.read_json_object(seen.path / "config.json") or {},
                all_options(),
            )
            return RunDetail(
                summary=summary,
                model=started.model if started else "",
                device=started.device if started else "",
                config=config,
                changed={
                    n: v for n, v in config.items() if n in options and v != options[n].default
                },
                stages=list(digest.stages.values()) if summary.stage else [],
                stages_done=list(digest.stages_done),
                checkpoints=run_artifacts.list_checkpoints(seen.path, digest.best_step),
                outputs=run_artifacts.list_outputs(seen.path),
                resumes=list(digest.history.resume_steps),
                problems=[
                    describe_event(event) for _, event in digest.history.warnings[-MAX_NOTES:]
                ],
                notes=list(digest.notes),
                exit=seen.exit_record,
                events_end=digest.end_offset,
            )

    def _jobs_by_run(self) -> Mapping[str, Job]:
        """Never asked while the lock is held: jobs have one of their own."""
        jobs = self._newest_jobs()
        with self._lock:
            self._job_run_dirs = {id: job.run_dir for id, job in jobs.items() if job.run_dir}
        return jobs

    def _find_run(self, id: str) -> CachedRun | None:
        if id not in self._runs or not self._runs[id].path.is_dir():
            self._rescan()
        return self._runs.get(id)

    def _rescan(self) -> None:
        paths = {run_id(path): path for path in self._finder.find_run_folders()}
        for id, home in self._job_run_dirs.items():
            if (
                id not in paths
                and (path := self.workspace.resolve_or_none(home)) is not None
                and path.is_dir()
            ):
                paths[id] = path
        self._runs = {
            id: self._runs.get(id) or CachedRun.for_folder(path) for id, path in paths.items()
        }

    def _summarize(self, id: str, seen: CachedRun, job: Job | None, deadline: float) -> RunSummary:
        _refresh(seen, deadline)
        digest, history = seen.event_summary, seen.event_summary.history
        state, message = run_state(seen, job)
        last = digest.last_step_event
        return RunSummary(
            id=id,
            name=log_reader.replace_surrogates(seen.path.name),
            path=log_reader.replace_surrogates(str(seen.path)),
            state=state,
            step=digest.step,
            total_steps=digest.total_steps,
            loss=last.loss if last and last.loss == last.loss else None,
            left_s=digest.left_s if state == "running" else None,
            started_t=digest.process_started_t or (job.started_t if job else None),
            changed_t=max(history.last_event_time, seen.exit_t or 0.0) or None,
            sparkline=digest.loss_curve.points(),
            stage=next(reversed(digest.stages.values()), None) if state in ACTIVE_STATES else None,
            job=job.id if job else None,
            message=message,
            picture=digest.latest_image_path,
        )


def run_state(seen: CachedRun, job: Job | None) -> tuple[JobState, str]:
    """The state of a run and what there is to say about it. The lock is believed, then the job where
    exit.json is older than its start, then exit.json.
    """
    if seen.is_locked:
        asked = seen.file_stamps[-1] is not None or (job is not None and job.state == "stopping")
        return "stopping" if asked else _run_phase(seen), ""
    if job is not None:
        begun_t = float("inf") if job.started_t is None else job.started_t
        later = seen.exit_t is None or seen.exit_t < begun_t
        by_hand = job.ended_t is not None and job.ended_t < (
            seen.event_summary.process_started_t or 0.0
        )
        if later and not by_hand:
            return job.state, job.message
    status, message = (
        (seen.exit_record or {}).get("status"),
        (seen.exit_record or {}).get("message"),
    )
    state = STATE_OF_STATUS.get(status, "lost") if isinstance(status, str) else "lost"
    return state, message if isinstance(message, str) else ""


def _run_phase(seen: CachedRun) -> Phase:
    """run.lock is written anew by every process: older events are its forerunner's."""
    lock = seen.file_stamps[WATCHED_FILES.index("run.lock")]
    return (
        seen.event_summary.phase
        if lock is None or seen.event_summary.history.last_event_time * 1e9 >= lock[2]
        else "starting"
    )


def _refresh(seen: CachedRun, deadline: float) -> None:
    """Take in what has changed. The lock is only tried where it was held or something is new: a training that
    begins in the instant of the trial would find it taken.
    """
    before = seen.file_stamps or (None,) * len(WATCHED_FILES)
    stamps = tuple(_file_stamp(seen.path / name) for name in WATCHED_FILES)
    if stamps[1] != before[1]:
        seen.exit_record = log_reader.read_json_object(seen.path / "exit.json")
    if stamps[1] is not None:
        seen.is_locked = False
    elif seen.is_locked or stamps[:3] != before[:3]:
        seen.is_locked = is_locked(seen.path / "run.lock")
    if stamps[0] != before[0] or not seen.event_summary.caught_up:
        seen.event_summary.read_new_events(deadline)
    seen.file_stamps = stamps


def is_locked(lock: Path) -> bool:
    """Whether a process works in the folder of this run.lock. Nothing is made or written."""
    with log_reader.open_regular_file(lock) as file:
        if file is None:
            return False
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _was_deleted(job: Job) -> bool:
    """Whether the absent folder of an ended job was there: a person has removed it, and the run with it."""
    return job.state == "done" or (job.state in ENDED_STATES and job.begun)


def _summary_without_folder(id: str, job: Job) -> RunSummary:
    """A job that has no folder, or not yet, or that failed before it made one."""
    return RunSummary(
        id=id,
        name=Path(job.run_dir).name or job.name,
        path=job.run_dir,
        state=job.state,
        step=0,
        total_steps=None,
        loss=None,
        left_s=None,
        started_t=job.started_t,
        changed_t=job.queued_t,
        sparkline=[],
        stage=None,
        job=job.id,
        message=job.message,
        begun=False,
    )


def _file_stamp(path: Path) -> FileStamp:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _last_changed_ns(folder: Path) -> int:
    stamp = _file_stamp(folder / "events.jsonl")
    return stamp[2] if stamp else 0
