"""A workspace with jobs in it, for tests of the queue."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from simpletuner.server.draft_store import DraftStore
from simpletuner.server.job_service import JobService
from simpletuner.server.run_service import RunService
from simpletuner.server.schemas.configs import DraftWrite
from simpletuner.server.schemas.jobs import Job, JobRequest
from simpletuner.server.schemas.system import DeviceInfo
from simpletuner.server.supervisor import Supervisor
from simpletuner.server.workspace import Workspace

FAKE_TRAIN_COMMAND = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))
TIMEOUT_S = 90.0
ENDED_STATES = ("stopped", "failed", "done", "lost")


def wait_until(
    true: Callable[[], object], what: str, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Look again and again, and do `meanwhile` before each look."""
    deadline = time.monotonic() + TIMEOUT_S
    while meanwhile() or not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def make_device(kind: Any) -> DeviceInfo:
    return DeviceInfo(name=kind, kind=kind, memory_total_bytes=None, memory_free_bytes=None)


class QueueHarness:
    """One workspace and what a server has of it.

    `restarted` is the next server; nothing runs by itself.
    """

    def __init__(self, workspace: Path, *devices: str, grace_s: float = 60.0) -> None:
        self.workspace = Workspace(workspace)
        self.runs, self.drafts = RunService(self.workspace), DraftStore(self.workspace)
        self.jobs = JobService(self.workspace, self.runs, self.drafts, FAKE_TRAIN_COMMAND)
        self._devices, self._grace_s = devices or ("cpu",), grace_s
        self.supervisor = Supervisor(
            self.jobs, lambda: [make_device(one) for one in self._devices], grace_s
        )

    def restart(self) -> QueueHarness:
        self.supervisor.close()
        return QueueHarness(self.workspace.root, *self._devices, grace_s=self._grace_s)

    def create_draft(
        self, name: str = "zorbo", datasets: list[dict[str, Any]] | None = None, **config: Any
    ) -> str:
        photos = self.workspace.datasets_dir / "photos"
        photos.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(photos / "a.png")
        (photos / "a.txt").write_text("a")
        sets = (
            [{"id": "photos", "instance_data_dir": "datasets/photos"}]
            if datasets is None
            else datasets
        )
        wanted = DraftWrite(name=name, config={"model_flavour": "nano", **config}, datasets=sets)
        return self.drafts.create(wanted).id

    def write_dataset_file(self) -> str:
        """A list of datasets in a file of its own, with a comment and a relative folder."""
        self.create_draft()
        file = self.workspace.root / "config" / "multidatabackend.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text('// by hand\n[{"id": "photos", "instance_data_dir": "../datasets/photos"}]')
        return str(file)

    def enqueue(self, name: str = "zorbo", **config: Any) -> Job:
        return self.jobs.enqueue(JobRequest(draft=self.create_draft(name, **config)))

    def job_state(self, job: Job) -> str:
        return self.jobs.get_job(job.id).state

    def wait_for_state(self, job: Job, *states: str) -> Job:
        """Supervise until the job is in one of these states; ended ones are written down then."""

        def there() -> bool:
            return self.job_state(job) in states

        wait_until(
            there, f"{job.name} is {states}; it is {self.job_state(job)}", self.supervisor.run_once
        )
        self.supervisor.run_once()
        return self.jobs.get_job(job.id)

    def read_job_file(self, job: Job, name: str) -> Any:
        return json.loads((self.jobs.jobs_dir / job.id / name).read_text())
