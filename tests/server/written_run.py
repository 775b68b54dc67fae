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

from simpletuner.events import types
from simpletuner.events.log import to_record
from simpletuner.server.api import runs as api
from simpletuner.server.live import Watcher
from simpletuner.server.place import Place
from simpletuner.server.refusal import answer_refusals
from simpletuner.server.runs import Runs
from simpletuner.server.wire.jobs import Queue

BEGAN = 1_790_000_000.0


class WrittenRun:
    """t: unix seconds of the next event. Every step takes two of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.t = path, BEGAN
        (path / "control").mkdir(parents=True)
        self.events = path / "events.jsonl"

    def tell(self, *events: types.Event) -> WrittenRun:
        with self.events.open("a", encoding="utf-8", errors="backslashreplace") as file:
            for event in events:
                file.write(json.dumps(to_record(event, self.t), ensure_ascii=False) + "\n")
                self.t += 2
        return self

    def starts(self, total: int = 100, resumed: int = 0) -> WrittenRun:
        self.tell(types.StageStarted("scan", 4, "pictures"), types.StageDone("scan", 4, 0.1))
        self.tell(types.RunStarted("0.1.0", str(self.path), "chroma nano", "cpu", total, resumed))
        return self.tell(types.Resumed(resumed, f"checkpoint-{resumed}")) if resumed else self

    def steps(
        self, first: int, last: int, total: int = 100, loss: Callable[[int], float] = lambda step: 1 / step
    ) -> WrittenRun:
        return self.tell(*(stepped(step, total, loss(step)) for step in range(first, last + 1)))

    def many_steps(self, last: int) -> WrittenRun:
        """Steps 1 to `last`, all alike and quickly written."""
        head, _, rest = json.dumps(to_record(stepped(1, last), self.t)).partition('"step": 1,')
        with self.events.open("a", encoding="utf-8") as file:
            file.writelines(f'{head}"step": {step},{rest}\n' for step in range(1, last + 1))
        return self

    def draws(self, step: int, content: bytes = b"", prompt: str = "a red zorbo") -> WrittenRun:
        name = f"images/step-{step:06d}/red-0-8x8.png"
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return self.tell(types.ImageSaved(step, "red", prompt, name, 42, 8, 8, "trained"))

    def checkpoint(self, step: int) -> Path:
        folder = self.path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"lora %d" % step)
        self.tell(types.Saved(step, folder.name, 0.1, 8))
        return folder

    def ends(self, status: str = "done", step: int = 100, message: str = "", t: float | None = None) -> None:
        record = {"exit_code": 0, "status": status, "step": step, "message": message, "t": t or self.t}
        (self.path / "exit.json").write_text(json.dumps(record))

    @contextmanager
    def held(self) -> Iterator[None]:
        """As by a living process; the time of run.lock is that of the last event."""
        lock = self.path / "run.lock"
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.utime(lock, (self.t - 1000, self.t - 1000))
            yield


def stepped(step: int, total: int = 100, loss: float = 0.5) -> types.Stepped:
    return types.Stepped(step, total, step // 10, loss, 1e-4, 0.1, 1.5, 4)


def no_jobs() -> Queue:
    return Queue(paused=False, continue_on_error=False, jobs=[])


def served(workspace: Path, most: int = 64, send_s: float = 15.0) -> FastAPI:
    """The routes of runs alone."""
    place = Place(workspace)
    runs = Runs(place)
    app = FastAPI(redirect_slashes=False)
    app.state.home = SimpleNamespace(place=place, runs=runs, live=Watcher(runs, no_jobs, most, send_s))
    answer_refusals(app)
    app.include_router(api.router)
    return app
