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

from simpletuner.config.catalog import catalog
from simpletuner.events.wording import describe
from simpletuner.server import pictures, tail
from simpletuner.server.digest import NOTES, Digest, Phase
from simpletuner.server.folders import Folders
from simpletuner.server.place import Place, run_id
from simpletuner.server.refusal import refuse
from simpletuner.server.states import ACTIVE, ENDED
from simpletuner.server.wire.base import State
from simpletuner.server.wire.jobs import Job
from simpletuner.server.wire.runs import Picture, RunDetail, RunSummary

READ_AT_ONCE_S = 0.25  # of events that nobody has read yet, for one list of runs
WATCHED = ("events.jsonl", "exit.json", "run.lock", "control/stop")
ENDS: Mapping[str, State] = {"done": "done", "stopped": "stopped", "failed": "failed"}  # of exit.json

Stamp = tuple[int, int, int] | None


@dataclass
class Seen:
    """A run folder as it was when it was last looked at. held: a process works there. exit: what exit.json
    says.
    """

    path: Path
    digest: Digest
    stamps: tuple[Stamp, ...] = ()
    held: bool = False
    exit: dict[str, Any] | None = None

    @classmethod
    def of(cls, path: Path) -> Seen:
        return cls(path, Digest(path / "events.jsonl"))

    @property
    def exit_t(self) -> float | None:
        t = self.exit.get("t") if self.exit else None
        return float(t) if isinstance(t, (int, float)) else None


class Runs:
    """Safe to use from several threads. Everything is derived from the folders at every look."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._folders = Folders(place)
        self._newest_jobs: Callable[[], Mapping[str, Job]] = dict
        self._homes: dict[str, str] = {}
        self._seen: dict[str, Seen] = {}
        self._lock = threading.RLock()

    def know(self, by_run: Callable[[], Mapping[str, Job]]) -> None:
        """by_run: the newest job of every run that has one, by run id. Jobs are made after runs, which they
        ask about; this asks no runs.
        """
        self._newest_jobs = by_run

    def summaries(self) -> list[RunSummary]:
        """Newest first, those to come before all. Of long events that nobody has read yet the first answer
        may know a part only; the next one goes on.
        """
        jobs, deadline = self._by_run(), time.monotonic() + READ_AT_ONCE_S
        with self._lock:
            self._look_around()
            newest = sorted(self._seen.items(), key=lambda one: _changed(one[1].path), reverse=True)
            found = [self._summary(id, seen, jobs.get(id), deadline) for id, seen in newest]
            absent = (id for id in jobs if id not in self._seen)
            found += [_to_come(id, jobs[id]) for id in absent if not _removed(jobs[id])]
        return sorted(found, key=lambda run: (run.state == "queued", run.started_t or 0.0), reverse=True)

    def summary(self, id: str) -> RunSummary:
        """Raises Refused: 404 when there is no such run."""
        job = self._by_run().get(id)
        with self._lock:
            seen = self._one(id)
            if seen is not None:
                return self._summary(id, seen, job, float("inf"))
        known = job is not None and not _removed(job)
        return _to_come(id, job) if known and job else refuse(404, "there is no such run")

    def find(self, id: str) -> Path | None:
        """The folder of a run that has one."""
        if id not in self._seen:
            self._by_run()
        with self._lock:
            seen = self._one(id)
            return seen.path if seen else None

    def pictures(self, id: str) -> list[Picture]:
        self.summary(id)
        with self._lock:
            return pictures.pictures(self._seen[id].digest.history) if id in self._seen else []

    def detail(self, id: str) -> RunDetail:
        summary = self.summary(id)
        with self._lock:
            seen = self._seen.get(id) or Seen.of(Path(summary.path))
            digest, started = seen.digest, seen.digest.history.started
            config, options = tail.document(seen.path / "config.json") or {}, catalog()
            return RunDetail(
                summary=summary, model=started.model if started else "",
                device=started.device if started else "", config=config,
                changed={n: v for n, v in config.items() if n in options and v != options[n].default},
                stages=list(digest.stages.values()) if summary.stage else [],
                stages_done=list(digest.stages_done),
                checkpoints=pictures.checkpoints(seen.path, digest.best_step),
                outputs=pictures.outputs(seen.path), resumes=list(digest.history.resumes),
                problems=[describe(event) for _, event in digest.history.problems[-NOTES:]],
                notes=list(digest.notes), exit=seen.exit, events_end=digest.end,
            )  # fmt: skip

    def _by_run(self) -> Mapping[str, Job]:
        """Never asked while the lock is held: jobs have one of their own."""
        jobs = self._newest_jobs()
        with self._lock:
            self._homes = {id: job.run_dir for id, job in jobs.items() if job.run_dir}
        return jobs

    def _one(self, id: str) -> Seen | None:
        if id not in self._seen or not self._seen[id].path.is_dir():
            self._look_around()
        return self._seen.get(id)

    def _look_around(self) -> None:
        paths = {run_id(path): path for path in self._folders.runs()}
        for id, home in self._homes.items():
            if id not in paths and (path := self.place.allows(home)) is not None and path.is_dir():
                paths[id] = path
        self._seen = {id: self._seen.get(id) or Seen.of(path) for id, path in paths.items()}

    def _summary(self, id: str, seen: Seen, job: Job | None, deadline: float) -> RunSummary:
        _look(seen, deadline)
        digest, history = seen.digest, seen.digest.history
        state, message = state_of(seen, job)
        last = digest.last
        return RunSummary(
            id=id, name=tail.clean(seen.path.name), path=tail.clean(str(seen.path)), state=state,
            step=digest.step, total_steps=digest.total,
            loss=last.loss if last and last.loss == last.loss else None,
            left_s=digest.left_s if state == "running" else None,
            started_t=digest.process_t or (job.started_t if job else None),
            changed_t=max(history.last_t, seen.exit_t or 0.0) or None, sparkline=digest.curve.points(),
            stage=next(reversed(digest.stages.values()), None) if state in ACTIVE else None,
            job=job.id if job else None, message=message, picture=digest.picture,
        )  # fmt: skip


def state_of(seen: Seen, job: Job | None) -> tuple[State, str]:
    """The state of a run and what there is to say about it. The lock is believed, then the job where
    exit.json is older than its start, then exit.json.
    """
    if seen.held:
        asked = seen.stamps[-1] is not None or (job is not None and job.state == "stopping")
        return "stopping" if asked else _phase(seen), ""
    if job is not None:
        begun_t = float("inf") if job.started_t is None else job.started_t
        later = seen.exit_t is None or seen.exit_t < begun_t
        by_hand = job.ended_t is not None and job.ended_t < (seen.digest.process_t or 0.0)
        if later and not by_hand:
            return job.state, job.message
    status, message = (seen.exit or {}).get("status"), (seen.exit or {}).get("message")
    state = ENDS.get(status, "lost") if isinstance(status, str) else "lost"
    return state, message if isinstance(message, str) else ""


def _phase(seen: Seen) -> Phase:
    """run.lock is written anew by every process: older events are its forerunner's."""
    lock = seen.stamps[WATCHED.index("run.lock")]
    return seen.digest.phase if lock is None or seen.digest.history.last_t * 1e9 >= lock[2] else "starting"


def _look(seen: Seen, deadline: float) -> None:
    """Take in what has changed. The lock is only tried where it was held or something is new: a training that
    begins in the instant of the trial would find it taken.
    """
    before = seen.stamps or (None,) * len(WATCHED)
    stamps = tuple(_stamp(seen.path / name) for name in WATCHED)
    if stamps[1] != before[1]:
        seen.exit = tail.document(seen.path / "exit.json")
    if stamps[1] is not None:
        seen.held = False
    elif seen.held or stamps[:3] != before[:3]:
        seen.held = held(seen.path / "run.lock")
    if stamps[0] != before[0] or not seen.digest.complete:
        seen.digest.read(deadline)
    seen.stamps = stamps


def held(lock: Path) -> bool:
    """Whether a process works in the folder of this run.lock. Nothing is made or written."""
    with tail.opened(lock) as file:
        if file is None:
            return False
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _removed(job: Job) -> bool:
    """Whether the absent folder of an ended job was there: a person has removed it, and the run with it."""
    return job.state == "done" or (job.state in ENDED and job.begun)


def _to_come(id: str, job: Job) -> RunSummary:
    """A job that has no folder, or not yet, or that failed before it made one."""
    return RunSummary(
        id=id, name=Path(job.run_dir).name or job.name, path=job.run_dir, state=job.state, step=0,
        total_steps=None, loss=None, left_s=None, started_t=job.started_t, changed_t=job.queued_t,
        sparkline=[], stage=None, job=job.id, message=job.message, begun=False,
    )  # fmt: skip


def _stamp(path: Path) -> Stamp:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _changed(folder: Path) -> int:
    stamp = _stamp(folder / "events.jsonl")
    return stamp[2] if stamp else 0
