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

from simpletuner.durable import write_atomically
from simpletuner.server.drafts import Drafts
from simpletuner.server.frozen import Frozen, of_draft, of_run
from simpletuner.server.index import Index, Order
from simpletuner.server.jobfolder import JobFolder, Work
from simpletuner.server.judge import judge
from simpletuner.server.pictures import CHECKPOINT, step_of
from simpletuner.server.place import Place, run_id
from simpletuner.server.refusal import Refused, refuse
from simpletuner.server.runs import Runs, held
from simpletuner.server.settings import TRAINER
from simpletuner.server.states import ACTIVE, ENDED, PHASES
from simpletuner.server.tail import document
from simpletuner.server.wire.jobs import Job, JobAsk, Queue, QueueWrite
from simpletuner.server.wire.runs import ResumeAsk

Control = Literal["stop", "save", "validate"]  # files in control/ by which a run is asked for something
ID = re.compile(r"[0-9a-f]{12}")
ENDED_SHOWN = 200


def in_order(jobs: Iterable[Job], order: Order) -> list[Job]:
    """Those that wait; one that the order does not know comes last."""
    places = {id: place for place, id in enumerate(order.jobs)}
    waiting = [job for job in jobs if job.state == "queued"]
    return sorted(waiting, key=lambda job: (places.get(job.id, len(places)), job.queued_t))


class Jobs:
    """trainer: as in Settings. changed: set when there is something to do for the supervisor."""

    def __init__(self, place: Place, runs: Runs, drafts: Drafts, trainer: tuple[str, ...] = TRAINER) -> None:
        self.place, self.folder = place, place.own / "jobs"
        self.index, self.changed = Index(place.own), threading.Event()
        self._runs, self._drafts, self._trainer = runs, drafts, trainer
        runs.know(self.by_run)
        self.lock = threading.RLock()

    def queue(self) -> Queue:
        order, jobs = self.index.order(), self._all()
        active = sorted((job for job in jobs if job.state in ACTIVE), key=lambda job: job.queued_t)
        ended = (job for job in jobs if job.state in ENDED)
        newest = sorted(ended, key=lambda job: job.ended_t or 0.0, reverse=True)
        return Queue(
            paused=order.paused,
            continue_on_error=order.continue_on_error,
            jobs=[*in_order(jobs, order), *map(self._with_phase, active), *newest[:ENDED_SHOWN]],
        )

    def job(self, id: str) -> Job:
        """404 for what is no job's id."""
        folder = self._folder(id) if ID.fullmatch(id) else None
        found = folder.written() or folder.view() if folder else None
        return self._with_phase(found) if found else refuse(404, "there is no such job")

    def by_run(self) -> dict[str, Job]:
        """The newest job of every run that has one; one that has not ended, whatever the clock said."""
        found = sorted(self._all(), key=lambda job: (job.state not in ENDED, job.queued_t))
        return {job.run: job for job in found if job.run}

    def elsewhere(self) -> int:
        """How many runs work in this workspace that no job here started."""
        mine = {run for run, job in self.by_run().items() if job.state in ACTIVE}
        return sum(run.state in ACTIVE and run.id not in mine for run in self._runs.summaries())

    def enqueue(self, ask: JobAsk) -> Job:
        """Freeze a draft as it is now."""
        draft = self._drafts.get(ask.draft)
        problems = judge(self.place, draft.config, draft.datasets).problems
        if problems:
            raise Refused(422, problems)
        return self._add(draft.name, ask.kind, of_draft(draft, self.place, ask.kind == "train"))

    def resume(self, run: str, ask: ResumeAsk) -> Job:
        """Queue a run again with the configuration it had last; the job's message says what was left out."""
        summary, last = self._runs.summary(run), self.by_run().get(run)
        run_dir = Path(last.run_dir) if last else self._found(run)  # one that was stopped early has no folder
        if ask.checkpoint is not None and not self._has_checkpoint(run_dir, ask.checkpoint):
            refuse(422, "the run has no checkpoint of that name", "checkpoint")
        begun = [run_dir / ask.checkpoint] if ask.checkpoint else run_dir.glob("checkpoint-*")
        begins = max((0, *map(step_of, begun)))
        if ask.max_train_steps is not None and ask.max_train_steps < max(1, begins):
            refuse(422, f"the checkpoint is at step {begins}; max_train_steps is no less", "max_train_steps")
        longer = ask.max_train_steps is not None and ask.max_train_steps > summary.step
        if summary.state == "done" and ask.checkpoint is None and not longer:
            what = f"the run is done at step {summary.step}: max_train_steps above that"
            refuse(422, what, "max_train_steps")
        source = self.folder / last.id / "config" / "config.json" if last else run_dir / "config.json"
        frozen = of_run(run_dir, source, self.place, ask.max_train_steps, ask.checkpoint)
        added = self._add(summary.name, "train", frozen)
        return added.model_copy(update={"message": "; ".join(frozen.left_out)})

    def withdraw(self, id: str) -> None:
        """Out of the queue, or out of the list where it ended without a run folder, into the trash. A
        rehearsal that was begun is ended: it has nothing to save.
        """
        with self.lock:
            job = self.job(id)
            if job.state in ACTIVE and job.kind == "rehearse":
                self._ask(self._folder(id), insist=True)
                return
            if job.state in ACTIVE:
                refuse(409, "only a job that waits can be withdrawn; stop its run instead")
            if job.state in ENDED and job.begun:
                refuse(409, "its run was begun: remove the run folder to be rid of it")
            os.rename(self.folder / id, self.place.trash() / f"job-{id}")
            order = self.index.order()
            self._reorder(replace(order, jobs=tuple(job for job in order.jobs if job != id)))

    def arrange(self, write: QueueWrite) -> Queue:
        """409 when the order is not of the jobs that wait now: somebody else was quicker."""
        with self.lock:
            changed = write.model_dump(exclude={"order"}, exclude_none=True)
            if write.order is not None:
                if sorted(write.order) != sorted(folder.id for folder in self.waiting()):
                    refuse(409, "the queue has changed meanwhile; look again", "order")
                changed["jobs"] = tuple(write.order)
            self._reorder(replace(self.index.order(), **changed))
        return self.queue()

    def stop(self, run: str, insist: bool) -> None:
        """Ask the run to save and leave; insist: end it now."""
        last = self.by_run().get(run)
        if last is not None and last.state in ACTIVE:
            self._ask(self._folder(last.id), insist)
        elif last is not None and last.state == "queued":
            refuse(409, "the run waits in the queue: withdraw its job instead")
        elif insist:
            refuse(409, "this run was started elsewhere: end it there, or let it save and leave")
        else:
            self.request(run, "stop")

    def _ask(self, folder: JobFolder, insist: bool) -> None:
        try:
            folder.ask(insist)
        except OSError:  # a full disk keeps no wish: say it at once, and once
            if not folder.signal(signal.SIGKILL if insist else signal.SIGINT):
                raise
        self.changed.set()

    def request(self, run: str, control: Control) -> None:
        """Lay a file that the running process looks for. 409 when nothing runs there."""
        run_dir = self._found(run)
        if not held(run_dir / "run.lock"):
            refuse(409, "the run is not running")
        options = document(run_dir / "config.json") or {}
        prompts = any(options.get(name, "unknown") for name in ("validation_prompt", "user_prompt_library"))
        if control == "validate" and (options.get("validation_disable") or not prompts):
            refuse(409, "this run draws no pictures: it has no prompts, or validation_disable is on")
        self.place.below(run_dir, f"control/{control}").touch()

    def waiting(self) -> list[JobFolder]:
        """Those that could be started, in their order."""
        return [self._folder(job.id) for job in in_order(self._views(), self.index.order())]

    def unsettled(self) -> list[JobFolder]:
        """Those that were started and whose end has not been written down."""
        return [self._folder(job.id) for job in self._views() if job.state != "queued"]

    def settle(self, folder: JobFolder) -> None:
        """Write down what an ended job came to. A failure holds those that wait, unless told otherwise."""
        with self.lock:
            ended = folder.view()
            if ended is None or ended.state not in ENDED:
                return
            write_atomically(folder.path / "end.json", ended.model_dump_json(indent=1) + "\n")
            self.index.write_ended(folder.id, ended.model_dump_json())
            order = self.index.order()
            failed = ended.state in ("failed", "lost") and ended.kind == "train"
            if failed and not order.continue_on_error and self.waiting():
                self._reorder(replace(order, paused=True))

    def _add(self, name: str, kind: Literal["train", "rehearse"], frozen: Frozen) -> Job:
        rehearsal, run = kind == "rehearse", run_id(frozen.run_dir)
        with self.lock:
            if not rehearsal:
                self._require_free(frozen.run_dir, run)
            folder = self._folder(secrets.token_hex(6))
            config = frozen.write(folder.path / "config")
            work = Work(
                name=name,
                kind=kind,
                argv=(*self._trainer, "--config", str(config), *(["--rehearse"] if rehearsal else [])),
                cwd=str(self.place.workspace),
                run_dir="" if rehearsal else str(frozen.run_dir),
                run="" if rehearsal else run,
                devices="cpu" if rehearsal or frozen.config.get("device") == "cpu" else "gpu",
                queued_t=time.time(),
            )
            folder.write_work(work)
            order = self.index.order()
            self._reorder(replace(order, jobs=(*order.jobs, folder.id)))
        return self.job(folder.id)

    def _require_free(self, run_dir: Path, run: str) -> None:
        """A process that has told how its run ended may still be leaving: the queue waits for its device."""
        last = self.by_run().get(run)
        if last is not None and last.state not in ENDED:
            leaving = last.started_t is not None and self._runs.summary(run).state in ENDED
            if not leaving:
                what = f"already has a job that is {last.state}; stop it, or choose another output_dir"
                refuse(409, f"{run_dir} {what}", "output_dir")
        if held(run_dir / "run.lock"):
            refuse(409, f"a training that was started elsewhere works in {run_dir}", "output_dir")

    def _reorder(self, order: Order) -> None:
        self.index.write_order(order)
        self.changed.set()

    def _found(self, run: str) -> Path:
        return (self._runs.find(run) if ID.fullmatch(run) else None) or refuse(404, "there is no such run")

    def _has_checkpoint(self, run_dir: Path, name: str) -> bool:
        return CHECKPOINT.fullmatch(name) is not None and self.place.below(run_dir, name).is_dir()

    def _folder(self, id: str) -> JobFolder:
        return JobFolder(self.folder / id)

    def _ids(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.folder) if ID.fullmatch(name)]
        except FileNotFoundError:
            return []

    def _with_phase(self, job: Job) -> Job:
        """Nearer than "starting": by the run's events. One that has ended still has a process for a while."""
        if job.state != "starting" or not job.run:
            return job
        found = self._runs.summary(job.run).state
        phase = "running" if found in ENDED else found
        return job.model_copy(update={"state": phase}) if phase in PHASES else job

    def _views(self) -> list[Job]:
        """Of all that wait, run, or ended without having been settled."""
        with self.lock:
            known = self.index.ended()
            found = []
            for id in self._ids():
                if id in known:
                    continue
                folder = self._folder(id)
                ended = folder.written()
                if ended is not None:
                    self.index.write_ended(id, ended.model_dump_json())
                elif (view := folder.view()) is not None:
                    found.append(view)
            return found

    def _all(self) -> list[Job]:
        with self.lock:
            living, here = self._views(), set(self._ids())
            ended = self.index.ended().items()
            return [*living, *(Job.model_validate_json(text) for id, text in ended if id in here)]
