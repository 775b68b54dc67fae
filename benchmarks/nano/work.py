"""Work through the cells: a few at a time, each a run of the product, finished ones skipped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nano import plan, result
from benchmarks.nano.plan import Cell, Size
from benchmarks.nano.world import ROOT, World, base_fingerprint, python, settings

PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "simpletuner": ("-m", "simpletuner", "train"),
    "world": ("-m", "simpletuner", "train"),
    "padded": ("-m", "benchmarks.nano.padded"),
}
LORA = "pytorch_lora_weights.safetensors"
HEAVY = ("checkpoint-*", "transformer", "cache")  # of a finished run; its numbers are kept
# One thread a run: on two cores two runs side by side get more done than one run with two threads.
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
         "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}  # fmt: skip


@dataclass(frozen=True)
class Folders:
    """root: everything of one set of measurements, `--out`."""

    root: Path

    @property
    def world(self) -> World:
        return World(self.root / "world")

    def run(self, cell_name: str) -> Path:
        return self.root / "cells" / cell_name

    def finished(self, cell: Cell, size: Size, base: str) -> result.Result | None:
        """The cell's result, if it is of these settings and this base."""
        found = result.load(self.run(cell.name) / result.NAME)
        if found is None or found.base != base:
            return None
        chosen = found.learning_rate if cell.variant.rate_from else None
        return found if found.options == settings(cell, size, chosen) else None


class Queue:
    """Cells by state. claim() waits until one can begin; None when nothing is left that could."""

    def __init__(self, cells: Sequence[Cell], done: set[str]) -> None:
        self.cells = {cell.name: cell for cell in cells}
        self.done, self.failed = set(done), dict[str, str]()
        self._running: set[str] = set()
        self._changed = threading.Condition()
        self.stopped = False

    def claim(self) -> Cell | None:
        with self._changed:
            while not self.stopped:
                self._give_up()
                waiting = [cell for name, cell in self.cells.items() if self._waits(name)]
                ready = next((cell for cell in waiting if self.done.issuperset(cell.needs)), None)
                if ready is not None:
                    self._running.add(ready.name)
                    return ready
                if not self._running:
                    return None
                self._changed.wait()
            return None

    def settle(self, cell: Cell, why_failed: str | None) -> None:
        with self._changed:
            self._running.discard(cell.name)
            if why_failed is None:
                self.done.add(cell.name)
            else:
                self.failed[cell.name] = why_failed
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def left(self) -> list[Cell]:
        """Neither done nor given up."""
        return [
            cell for name, cell in self.cells.items() if name not in self.done and name not in self.failed
        ]

    def _waits(self, name: str) -> bool:
        return name not in self.done and name not in self.failed and name not in self._running

    def _give_up(self) -> None:
        for name, cell in self.cells.items():
            lost = [need for need in cell.needs if need in self.failed or need not in self.cells]
            if lost and self._waits(name):
                self.failed[name] = f"needs {', '.join(lost)}"


class Runner:
    """Runs what is not finished, `workers` at a time, and says how it goes."""

    def __init__(
        self, folders: Folders, size: Size, cells: Sequence[Cell], say: Callable[[str], None]
    ) -> None:
        self.folders, self.size, self.say = folders, size, say
        self.base = base_fingerprint()
        self.queue = Queue(cells, {cell.name for cell in cells if folders.finished(cell, size, self.base)})
        self._children: set[subprocess.Popen[bytes]] = set()
        self._env = {**os.environ, **QUIET}
        self._spent: list[tuple[float, float]] = []  # (seconds, estimate) of what was done here
        self._workers = 1

    def run(self, workers: int) -> dict[str, str]:
        """Failed cells with the reason. KeyboardInterrupt: the runs save and leave, then it is raised."""
        self._workers = workers
        left = self.queue.left()
        self.say(f"{len(self.queue.done)} of {len(self.queue.cells)} cells are finished; {self._time_left()}")
        if not left:
            return {}
        self.folders.world.root.mkdir(parents=True, exist_ok=True)
        self.folders.world.make_lesson(self.size, python(ROOT, self._env))
        with ThreadPoolExecutor(workers) as pool:
            try:
                for future in [pool.submit(self._work) for _ in range(workers)]:
                    while not future.done():
                        wait([future], timeout=1.0)
                    future.result()
            except BaseException:
                self._stop()
                raise
        return self.queue.failed

    def _work(self) -> None:
        while (cell := self.queue.claim()) is not None:
            why = None
            try:
                self._perform(cell)
            except (RuntimeError, OSError, ValueError) as error:
                why = str(error)
            self.queue.settle(cell, why)
            self.say(self._line(cell, why))

    def _perform(self, cell: Cell) -> None:
        started = time.monotonic()
        run_dir = self.folders.run(cell.name)
        if cell.variant.program == "world":
            self.folders.world.make_shapes(self.size, python(ROOT, self._env))
        options = settings(cell, self.size, self._rate(cell))
        lora = (
            cell.variant.lora_from
            and self.folders.run(plan.cell_name(cell.variant.lora_from, cell.seed)) / LORA
        )
        paths = self.folders.world.paths(cell, run_dir, lora or None)
        run_dir.mkdir(parents=True, exist_ok=True)
        config = run_dir / "asked.json"
        config.write_text(json.dumps({**options, **paths}, indent=2), encoding="utf-8")
        self._train([*PROGRAMS[cell.variant.program], "--config", str(config)], run_dir)
        seconds = time.monotonic() - started
        done = result.of_finished(run_dir, cell.name, options, self.base, seconds)
        result.write(run_dir / result.NAME, done)
        for pattern in HEAVY:
            for path in run_dir.glob(pattern):
                shutil.rmtree(path)
        self._spent.append((seconds, plan.estimate_s(cell, self.size)))

    def _rate(self, cell: Cell) -> float | None:
        """The learning rate of the trial with the lowest held-out loss; None when the options say it."""
        names = [plan.cell_name(name, plan.TRIAL_SEED) for name in cell.variant.rate_from]
        trials = [result.load(self.folders.run(name) / result.NAME) for name in names]
        found = [trial for trial in trials if trial is not None]
        return min(found, key=lambda trial: trial.held_out).learning_rate if found else None

    def _train(self, arguments: Sequence[str], run_dir: Path) -> None:
        """A session of its own: an interrupt reaches it once, through _stop."""
        with (run_dir / "output.txt").open("wb") as told:
            child = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=self._env, stdout=told, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code:
            words = (
                (run_dir / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            )
            raise RuntimeError(f"ended with {code}: {words[-1] if words else 'no word'} (see {told.name})")

    def _stop(self) -> None:
        self.queue.stop()
        for child in tuple(self._children):
            child.send_signal(signal.SIGINT)

    def _line(self, cell: Cell, why: str | None) -> str:
        count = f"[{len(self.queue.done)}/{len(self.queue.cells)}] {cell.name}"
        if why is not None:
            return f"{count} {'left' if self.queue.stopped else 'FAILED'}: {why}"
        found = result.load(self.folders.run(cell.name) / result.NAME)
        assert found is not None
        known = result.measures(found, None)
        shown = [
            f"{name} {known[name]:.4g}" for name in ("held_out", "shapes_all", "zorbo_zorbo") if name in known
        ]
        return f"{count}: {found.seconds:.0f} s, {', '.join(shown)}; {self._time_left()}"

    def _time_left(self) -> str:
        spent, expected = (sum(column) for column in zip((0.0, 0.0), *self._spent))
        pace = spent / expected if expected else 1.0
        left = pace * sum(plan.estimate_s(cell, self.size) for cell in self.queue.left())
        return f"about {left / self._workers / 60:.0f} min left"
