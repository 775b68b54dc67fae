"""A run folder as the training writes it, without the training."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from fastapi import FastAPI

from simpletuner.events import event_types
from simpletuner.events.event_log import event_to_dict
from simpletuner.server.api import runs as api
from simpletuner.server.api_errors import register_error_handlers
from simpletuner.server.live_broadcaster import LiveBroadcaster
from simpletuner.server.run_service import RunService
from simpletuner.server.schemas.jobs import Queue
from simpletuner.server.workspace import Workspace

START_T = 1_790_000_000.0


class RunFolderWriter:
    """t: unix seconds of the next event. Every step takes two of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.next_event_t = path, START_T
        (path / "control").mkdir(parents=True)
        self.events = path / "events.jsonl"

    def write_events(self, *events: event_types.Event) -> RunFolderWriter:
        with self.events.open("a", encoding="utf-8", errors="backslashreplace") as file:
            for event in events:
                file.write(
                    json.dumps(event_to_dict(event, self.next_event_t), ensure_ascii=False) + "\n"
                )
                self.next_event_t += 2
        return self

    def write_start(self, total: int = 100, resumed: int = 0) -> RunFolderWriter:
        self.write_events(
            event_types.StageStarted("scan", 4, "pictures"),
            event_types.StageCompleted("scan", 4, 0.1),
        )
        self.write_events(
            event_types.RunStarted("0.1.0", str(self.path), "chroma nano", "cpu", total, resumed)
        )
        return (
            self.write_events(event_types.RunResumed(resumed, f"checkpoint-{resumed}"))
            if resumed
            else self
        )

    def write_steps(
        self,
        first: int,
        last: int,
        total: int = 100,
        loss: Callable[[int], float] = lambda step: 1 / step,
    ) -> RunFolderWriter:
        return self.write_events(
            *(make_step_event(step, total, loss(step)) for step in range(first, last + 1))
        )

    def write_many_steps(self, last: int) -> RunFolderWriter:
        """Steps 1 to `last`, all alike and quickly written."""
        head, _, rest = json.dumps(
            event_to_dict(make_step_event(1, last), self.next_event_t)
        ).partition('"step": 1,')
        with self.events.open("a", encoding="utf-8") as file:
            file.writelines(f'{head}"step": {step},{rest}\n' for step in range(1, last + 1))
        return self

    def write_image(
        self, step: int, content: bytes = b"", prompt: str = "a red zorbo"
    ) -> RunFolderWriter:
        name = f"images/step-{step:06d}/red-0-8x8.png"
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return self.write_events(
            event_types.ImageSaved(step, "red", prompt, name, 42, 8, 8, "trained")
        )

    def write_checkpoint(self, step: int) -> Path:
        folder = self.path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"lora %d" % step)
        self.write_events(event_types.WeightsSaved(step, folder.name, 0.1, 8))
        return folder

    def write_exit(
        self, status: str = "done", step: int = 100, message: str = "", t: float | None = None
    ) -> None:
        record = {
            "exit_code": 0,
            "status": status,
            "step": step,
            "message": message,
            "t": t or self.next_event_t,
        }
        (self.path / "exit.json").write_text(json.dumps(record))

    @contextmanager
    def hold_lock(self) -> Iterator[None]:
        """As by a living process; the time of run.lock is that of the last event."""
        lock = self.path / "run.lock"
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.utime(lock, (self.next_event_t - 1000, self.next_event_t - 1000))
            yield


def make_step_event(step: int, total: int = 100, loss: float = 0.5) -> event_types.StepCompleted:
    return event_types.StepCompleted(step, total, step // 10, loss, 1e-4, 0.1, 1.5, 4)


def empty_queue() -> Queue:
    return Queue(paused=False, continue_on_error=False, jobs=[])


def make_runs_app(workspace: Path, most: int = 64, send_s: float = 15.0) -> FastAPI:
    """The routes of runs alone."""
    place = Workspace(workspace)
    runs = RunService(place)
    app = FastAPI(redirect_slashes=False)
    app.state.services = SimpleNamespace(
        workspace=place, runs=runs, broadcaster=LiveBroadcaster(runs, empty_queue, most, send_s)
    )
    register_error_handlers(app)
    app.include_router(api.router)
    return app
