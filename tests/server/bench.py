"""A workspace with jobs in it, for tests of the queue."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from simpletuner.server.drafts import Drafts
from simpletuner.server.jobs import Jobs
from simpletuner.server.place import Place
from simpletuner.server.runs import Runs
from simpletuner.server.supervisor import Supervisor
from simpletuner.server.wire.configs import DraftWrite
from simpletuner.server.wire.jobs import Job, JobAsk
from simpletuner.server.wire.system import Device

TRAINER = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))
PATIENCE_S = 90.0
ENDED = ("stopped", "failed", "done", "lost")


def until(true: Callable[[], object], what: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Look again and again, and do `meanwhile` before each look."""
    deadline = time.monotonic() + PATIENCE_S
    while meanwhile() or not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def card(kind: Any) -> Device:
    return Device(name=kind, kind=kind, memory_total_bytes=None, memory_free_bytes=None)


class Bench:
    """One workspace and what a server has of it. `restarted` is the next server; nothing runs by itself."""

    def __init__(self, workspace: Path, *devices: str, grace_s: float = 60.0) -> None:
        self.place = Place(workspace)
        self.runs, self.drafts = Runs(self.place), Drafts(self.place)
        self.jobs = Jobs(self.place, self.runs, self.drafts, TRAINER)
        self._devices, self._grace_s = devices or ("cpu",), grace_s
        self.supervisor = Supervisor(self.jobs, lambda: [card(one) for one in self._devices], grace_s)

    def restarted(self) -> Bench:
        self.supervisor.close()
        return Bench(self.place.workspace, *self._devices, grace_s=self._grace_s)

    def draft(self, name: str = "zorbo", datasets: list[dict[str, Any]] | None = None, **config: Any) -> str:
        photos = self.place.datasets / "photos"
        photos.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(photos / "a.png")
        (photos / "a.txt").write_text("a")
        sets = [{"id": "photos", "instance_data_dir": "datasets/photos"}] if datasets is None else datasets
        wanted = DraftWrite(name=name, config={"model_flavour": "nano", **config}, datasets=sets)
        return self.drafts.create(wanted).id

    def by_hand(self) -> str:
        """A list of datasets in a file of its own, with a comment and a relative folder."""
        self.draft()
        file = self.place.workspace / "config" / "multidatabackend.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text('// by hand\n[{"id": "photos", "instance_data_dir": "../datasets/photos"}]')
        return str(file)

    def enqueue(self, name: str = "zorbo", **config: Any) -> Job:
        return self.jobs.enqueue(JobAsk(draft=self.draft(name, **config)))

    def state(self, job: Job) -> str:
        return self.jobs.job(job.id).state

    def reach(self, job: Job, *states: str) -> Job:
        """Supervise until the job is in one of these states; ended ones are written down then."""

        def there() -> bool:
            return self.state(job) in states

        until(there, f"{job.name} is {states}; it is {self.state(job)}", self.supervisor.look)
        self.supervisor.look()
        return self.jobs.job(job.id)

    def file(self, job: Job, name: str) -> Any:
        return json.loads((self.jobs.folder / job.id / name).read_text())
