"""Runs: the folders of all trainings, whoever started them, and jobs that have no folder yet."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from simpletuner.config.option_catalog import all_options
from simpletuner.errors import ConfigError
from simpletuner.events import event_types
from simpletuner.events.formatting import describe_event
from simpletuner.server import run_artifacts
from simpletuner.server.api_errors import ApiError, abort
from simpletuner.server.event_summary import MAX_NOTES
from simpletuner.server.file_reader import replace_surrogates
from simpletuner.server.job_config import load_run_datasets
from simpletuner.server.job_states import ACTIVE_STATES, ENDED_STATES
from simpletuner.server.run_finder import RunFinder
from simpletuner.server.run_labels import RunLabels
from simpletuner.server.run_reader import RunReader
from simpletuner.server.schemas.base import JobState
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.schemas.library import RunLabel
from simpletuner.server.schemas.runs import (
    HeldOutVerdict,
    RunDetail,
    RunImage,
    RunProcesses,
    RunSummary,
)
from simpletuner.server.workspace import Workspace, run_id

READ_BUDGET_S = 0.25  # time per list of runs for reading events that were not read before
# The status in exit.json -> state.
STATE_OF_STATUS: Mapping[str, JobState] = {
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}


class RunService:
    """All runs of a workspace. Thread-safe. Everything is derived from the folders at each call."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.labels = RunLabels(workspace)
        self._finder = RunFinder(workspace)
        self._newest_jobs: Callable[[], Mapping[str, Job]] = dict
        self._job_run_dirs: dict[str, str] = {}
        self._readers: dict[str, RunReader] = {}
        # Run id -> what its summary was made of, and the summary.
        self._summaries: dict[str, tuple[SummarySources, RunSummary]] = {}
        self._lock = threading.RLock()

    def set_job_lookup(self, newest_by_run: Callable[[], Mapping[str, Job]]) -> None:
        """Set the function that returns the newest job of each run, by run id.

        It is set later because the job service is built after this one, which it depends on. The
        function must not call this service.
        """
        self._newest_jobs = newest_by_run

    def summaries(self) -> list[RunSummary]:
        """Return all runs, queued ones first, then the newest first.

        If long event logs are read for the first time, the summaries can be incomplete; the next
        call continues reading.
        """
        return self.summaries_and_unread()[0]

    def summaries_and_unread(self) -> tuple[list[RunSummary], set[str]]:
        """Return all summaries, and the runs of which only a part of the events is in them.

        Both are of one moment: in between, another request could read more.
        """
        jobs = self._jobs_by_run()
        deadline = time.monotonic() + READ_BUDGET_S
        with self._lock:
            self._rescan()
            newest_first = sorted(
                self._readers.items(), key=lambda item: item[1].last_changed_ns(), reverse=True
            )
            runs = [
                self._summarize(id, reader, jobs.get(id), deadline) for id, reader in newest_first
            ]
            runs += [
                _summary_without_folder(id, job)
                for id, job in jobs.items()
                if id not in self._readers and not _was_deleted(job)
            ]
            unread = {id for id, reader in self._readers.items() if not reader.is_read}
        runs.sort(key=lambda run: (run.state == "queued", run.started_t or 0.0), reverse=True)
        return runs, unread

    def summary(self, id: str) -> RunSummary:
        """Return the summary of a run. Raises ApiError 404 for an unknown id."""
        job = self._jobs_by_run().get(id)
        with self._lock:
            reader = self._find_reader(id)
            if reader is not None:
                return self._summarize(id, reader, job, float("inf"))
        if job is None or _was_deleted(job):
            abort(404, "there is no such run")
        return _summary_without_folder(id, job)

    def find_reader(self, id: str) -> RunReader | None:
        """Return the reader of a run's folder, None if the run has no folder."""
        if id not in self._readers:
            self._jobs_by_run()
        with self._lock:
            return self._find_reader(id)

    def find_folder(self, id: str) -> Path | None:
        """Return the folder of a run, None if it has none."""
        reader = self.find_reader(id)
        return reader.path if reader else None

    def list_images(self, id: str) -> list[RunImage]:
        """Return the validation images of a run. Raises ApiError 404 for an unknown id."""
        self.summary(id)
        with self._lock:
            if id not in self._readers:
                return []
            return run_artifacts.list_images(self._readers[id].summary.history)

    def process_count(self, id: str) -> int:
        """Return the number of processes of a run; 1 until it has started its training."""
        with self._lock:
            reader = self._readers.get(id)
            start = reader.summary.history.start_event if reader else None
        return start.world.processes if start and start.world else 1

    def seconds_per_step(self, id: str) -> float | None:
        """Return the measured time of a step, None before the first steps."""
        reader = self.find_reader(id)
        if reader is None:
            return None
        with self._lock:
            reader.refresh(time.monotonic() + READ_BUDGET_S)
            return reader.summary.seconds_per_step

    def detail(self, id: str) -> RunDetail:
        """Return all details of a run. Raises ApiError 404 for an unknown id."""
        summary = self.summary(id)
        with self._lock:
            reader = self._readers.get(id) or RunReader(Path(summary.path))
            events = reader.summary
            start = events.history.start_event
            # How the run ended is its state and message; an earlier failure is history.
            warnings = [
                event
                for _, event in events.history.warnings
                if not isinstance(event, event_types.RunFailed)
            ][-MAX_NOTES:]
            config = reader.config()
            options = all_options()
            return RunDetail(
                summary=summary,
                model=start.model if start else "",
                device=start.device if start else "",
                world=(
                    RunProcesses(**dataclasses.asdict(start.world))
                    if start and start.world
                    else None
                ),
                config=config,
                changed={
                    name: value
                    for name, value in config.items()
                    if name in options and value != options[name].default
                },
                stages=list(events.stages.values()) if summary.stage else [],
                stages_done=list(events.stages_done),
                checkpoints=run_artifacts.list_checkpoints(reader.path, events.best_step),
                outputs=run_artifacts.list_outputs(reader.path, events.history),
                documents=run_artifacts.list_documents(reader.path),
                datasets=self._dataset_names(config),
                resumes=list(events.resumes),
                verdict=_describe_verdict(events.history.verdict),
                problems=[describe_event(event) for event in warnings],
                notes=list(events.notes),
                exit=reader.exit_record,
                events_end=reader.events_end,
            )

    def _dataset_names(self, config: Mapping[str, Any]) -> list[str]:
        """Return the names of the workspace's datasets in a configuration."""
        try:
            datasets = load_run_datasets(config, self.workspace)
        except (ApiError, ConfigError):
            return []
        folders = (entry.get("instance_data_dir") for entry in datasets if isinstance(entry, dict))
        paths = (Path(folder) for folder in folders if isinstance(folder, str))
        names = (path.name for path in paths if path.parent == self.workspace.datasets_dir)
        return list(dict.fromkeys(names))

    def _jobs_by_run(self) -> Mapping[str, Job]:
        """Return the newest jobs.

        Never call this with the lock held: the job service has its own lock.
        """
        jobs = self._newest_jobs()
        with self._lock:
            self._job_run_dirs = {id: job.run_dir for id, job in jobs.items() if job.run_dir}
        return jobs

    def _find_reader(self, id: str) -> RunReader | None:
        if id not in self._readers or not self._readers[id].path.is_dir():
            self._rescan()
        return self._readers.get(id)

    def _rescan(self) -> None:
        """Update the set of runs: folders found in the workspace, and folders of jobs elsewhere."""
        paths = {run_id(path): path for path in self._finder.find_run_folders()}
        for id, run_dir in self._job_run_dirs.items():
            path = self.workspace.resolve_or_none(run_dir) if id not in paths else None
            if path is not None and path.is_dir():
                paths[id] = path
        self._readers = {id: self._readers.get(id) or RunReader(path) for id, path in paths.items()}
        self._summaries = {id: cached for id, cached in self._summaries.items() if id in paths}

    def _summarize(
        self, id: str, reader: RunReader, job: Job | None, deadline: float
    ) -> RunSummary:
        """Return the summary of a run, the same object as long as nothing has changed."""
        reader.refresh(deadline)
        sources = SummarySources(reader, reader.revision, job, self.labels.of(id))
        known = self._summaries.get(id)
        if known is None or known[0] != sources:
            known = self._summaries[id] = sources, _make_summary(id, sources)
        return known[1]


class SummarySources(NamedTuple):
    """The sources of the summary of a run. revision: of the reader."""

    reader: RunReader
    revision: int
    job: Job | None
    label: RunLabel


def _make_summary(id: str, sources: SummarySources) -> RunSummary:
    reader, job, label = sources.reader, sources.job, sources.label
    events = reader.summary
    state, message = derive_run_state(reader, job)
    last_step = events.last_step_event
    stage = next(reversed(events.stages.values()), None)
    return RunSummary(
        id=id,
        name=label.name or replace_surrogates(reader.path.name),
        path=replace_surrogates(str(reader.path)),
        state=state,
        step=events.step,
        total_steps=events.total_steps,
        loss=last_step.loss if last_step and last_step.loss == last_step.loss else None,
        left_s=events.left_s if state == "running" else None,
        started_t=events.process_started_t or (job.started_t if job else None),
        changed_t=max(events.history.last_event_time, reader.exit_t or 0.0) or None,
        sparkline=events.loss_curve.points(),
        stage=stage if state in ACTIVE_STATES else None,
        job=job.id if job else None,
        message=message,
        picture=events.latest_image_path,
        tags=label.tags,
        note=label.note,
        archived=label.archived,
    )


def derive_run_state(reader: RunReader, job: Job | None) -> tuple[JobState, str]:
    """Return the state of a run and a message about it.

    A held lock decides first. Next comes the job, unless exit.json or the events are newer than it,
    because the run was then continued from a terminal. Otherwise exit.json decides.
    """
    if reader.is_locked:
        stopping = reader.stop_requested or (job is not None and job.state == "stopping")
        return "stopping" if stopping else reader.phase, ""
    if job is not None:
        job_started_t = float("inf") if job.started_t is None else job.started_t
        is_newer = reader.exit_t is None or reader.exit_t < job_started_t
        restarted_t = reader.summary.process_started_t or 0.0
        restarted_by_hand = job.ended_t is not None and job.ended_t < restarted_t
        if is_newer and not restarted_by_hand:
            return job.state, job.message
    record = reader.exit_record or {}
    status, message = record.get("status"), record.get("message")
    state = STATE_OF_STATUS.get(status, "lost") if isinstance(status, str) else "lost"
    return state, message if isinstance(message, str) else ""


def _describe_verdict(event: event_types.VerdictReached | None) -> HeldOutVerdict | None:
    return None if event is None else HeldOutVerdict(**dataclasses.asdict(event))


def _was_deleted(job: Job) -> bool:
    """Return True if the missing folder of an ended job existed: the user has deleted the run."""
    return job.state == "done" or (job.state in ENDED_STATES and job.begun)


def _summary_without_folder(id: str, job: Job) -> RunSummary:
    """Summarize a run that has no folder yet, or that failed before it created one."""
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
