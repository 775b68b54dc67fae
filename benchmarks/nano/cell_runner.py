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

from benchmarks.nano import cell_result, experiments
from benchmarks.nano.cell_times import estimate_seconds
from benchmarks.nano.experiment_inputs import (
    ROOT,
    ExperimentInputs,
    base_fingerprint,
    cell_options,
    make_program_runner,
)
from benchmarks.nano.experiments import Cell, ExperimentSize

PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "simpletuner": ("-m", "simpletuner", "train"),
    "world": ("-m", "simpletuner", "train"),
    "padded": ("-m", "benchmarks.nano.padded"),
    "averaged": ("-m", "benchmarks.nano.averaged"),
}
LORA_FILE = "pytorch_lora_weights.safetensors"
REMOVED_WHEN_FINISHED = (
    "checkpoint-*",
    "transformer",
    "cache",
)  # of a finished run; its numbers are kept
# One thread a run: on two cores two runs side by side get more done than one run with two threads.
CHILD_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
         "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}  # fmt: skip


@dataclass(frozen=True)
class ExperimentFolders:
    """root: everything of one set of measurements, `--out`."""

    root: Path

    @property
    def inputs(self) -> ExperimentInputs:
        return ExperimentInputs(self.root / "world")

    def run_dir(self, cell_name: str) -> Path:
        return self.root / "cells" / cell_name

    def load_finished(
        self, cell: Cell, size: ExperimentSize, base: str
    ) -> cell_result.CellResult | None:
        """The cell's result, if it is of these settings and this base."""
        found = cell_result.load_result(self.run_dir(cell.name) / cell_result.RESULT_FILE)
        if found is None or found.base != base:
            return None
        chosen = found.learning_rate if cell.variant.learning_rate_trials else None
        return found if found.options == cell_options(cell, size, chosen) else None


class CellQueue:
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
                self._fail_blocked_cells()
                waiting = [cell for name, cell in self.cells.items() if self._is_pending(name)]
                ready = next((cell for cell in waiting if self.done.issuperset(cell.needs)), None)
                if ready is not None:
                    self._running.add(ready.name)
                    return ready
                if not self._running:
                    return None
                self._changed.wait()
            return None

    def mark_ended(self, cell: Cell, why_failed: str | None) -> None:
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

    def unfinished_cells(self) -> list[Cell]:
        """Neither done nor given up."""
        return [
            cell
            for name, cell in self.cells.items()
            if name not in self.done and name not in self.failed
        ]

    def _is_pending(self, name: str) -> bool:
        return name not in self.done and name not in self.failed and name not in self._running

    def _fail_blocked_cells(self) -> None:
        for name, cell in self.cells.items():
            lost = [need for need in cell.needs if need in self.failed or need not in self.cells]
            if lost and self._is_pending(name):
                self.failed[name] = f"needs {', '.join(lost)}"


class CellRunner:
    """Runs what is not finished, `workers` at a time, and says how it goes."""

    def __init__(
        self,
        folders: ExperimentFolders,
        size: ExperimentSize,
        cells: Sequence[Cell],
        say: Callable[[str], None],
    ) -> None:
        self.folders, self.size, self.print_line = folders, size, say
        self.base = base_fingerprint()
        self.queue = CellQueue(
            cells, {cell.name for cell in cells if folders.load_finished(cell, size, self.base)}
        )
        self._children: set[subprocess.Popen[bytes]] = set()
        self._env = {**os.environ, **CHILD_ENVIRONMENT}
        self._finished_times: list[
            tuple[float, float]
        ] = []  # (seconds, estimate) of what was done here
        self._workers = 1

    def run(self, workers: int) -> dict[str, str]:
        """Failed cells with the reason. KeyboardInterrupt: the runs save and leave, then it is
        raised.
        """
        self._workers = workers
        left = self.queue.unfinished_cells()
        self.print_line(
            f"{len(self.queue.done)} of {len(self.queue.cells)} cells are finished; {self._format_time_left()}"  # noqa: E501
        )
        if not left:
            return {}
        self.folders.inputs.root.mkdir(parents=True, exist_ok=True)
        self.folders.inputs.make_lesson_datasets(self.size, make_program_runner(ROOT, self._env))
        with ThreadPoolExecutor(workers) as pool:
            try:
                for future in [pool.submit(self._work_through_queue) for _ in range(workers)]:
                    while not future.done():
                        wait([future], timeout=1.0)
                    future.result()
            except BaseException:
                self._interrupt_children()
                raise
        return self.queue.failed

    def _work_through_queue(self) -> None:
        while (cell := self.queue.claim()) is not None:
            why = None
            try:
                self._run_cell(cell)
            except (RuntimeError, OSError, ValueError) as error:
                why = str(error)
            self.queue.mark_ended(cell, why)
            self.print_line(self._progress_line(cell, why))

    def _run_cell(self, cell: Cell) -> None:
        started = time.monotonic()
        run_dir = self.folders.run_dir(cell.name)
        if cell.variant.program == "world":
            self.folders.inputs.make_shapes_datasets(
                self.size, make_program_runner(ROOT, self._env)
            )
        options = cell_options(cell, self.size, self._choose_learning_rate(cell))
        lora = (
            cell.variant.init_lora_variant
            and self.folders.run_dir(
                experiments.cell_name(cell.variant.init_lora_variant, cell.seed)
            )
            / LORA_FILE
        )
        paths = self.folders.inputs.path_options(cell, run_dir, lora or None)
        # Next to the run folder, which belongs to the run alone.
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        config = run_dir.with_name(f"{run_dir.name}-asked.json")
        config.write_text(json.dumps({**options, **paths}, indent=2), encoding="utf-8")
        self._run_child([*PROGRAMS[cell.variant.program], "--config", str(config)], run_dir)
        seconds = time.monotonic() - started
        done = cell_result.read_finished_run(run_dir, cell.name, options, self.base, seconds)
        cell_result.write_result(run_dir / cell_result.RESULT_FILE, done)
        for pattern in REMOVED_WHEN_FINISHED:
            for path in run_dir.glob(pattern):
                shutil.rmtree(path)
        self._finished_times.append((seconds, estimate_seconds(cell, self.size)))

    def _choose_learning_rate(self, cell: Cell) -> float | None:
        """The learning rate of the trial with the lowest held-out loss; None when the options say
        it.
        """
        names = [
            experiments.cell_name(name, experiments.TRIAL_SEED)
            for name in cell.variant.learning_rate_trials
        ]
        trials = [
            cell_result.load_result(self.folders.run_dir(name) / cell_result.RESULT_FILE)
            for name in names
        ]
        found = [trial for trial in trials if trial is not None]
        return min(found, key=lambda trial: trial.held_out).learning_rate if found else None

    def _run_child(self, arguments: Sequence[str], run_dir: Path) -> None:
        """A session of its own: an interrupt reaches it once, through _stop."""
        output = run_dir.with_name(f"{run_dir.name}-output.txt")
        with output.open("wb") as told:
            child = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=self._env, stdout=told, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code:
            words = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(
                f"ended with {code}: {words[-1] if words else 'no word'} (see {told.name})"
            )

    def _interrupt_children(self) -> None:
        self.queue.stop()
        for child in tuple(self._children):
            child.send_signal(signal.SIGINT)

    def _progress_line(self, cell: Cell, why: str | None) -> str:
        count = f"[{len(self.queue.done)}/{len(self.queue.cells)}] {cell.name}"
        if why is not None:
            return f"{count} {'left' if self.queue.stopped else 'FAILED'}: {why}"
        found = cell_result.load_result(self.folders.run_dir(cell.name) / cell_result.RESULT_FILE)
        assert found is not None
        known = cell_result.named_measures(found, None)
        shown = [
            f"{name} {known[name]:.4g}"
            for name in ("held_out", "shapes_all", "zorbo_zorbo")
            if name in known
        ]
        return f"{count}: {found.seconds:.0f} s, {', '.join(shown)}; {self._format_time_left()}"

    def _format_time_left(self) -> str:
        spent, expected = (sum(column) for column in zip((0.0, 0.0), *self._finished_times))
        pace = spent / expected if expected else 1.0
        left = pace * sum(
            estimate_seconds(cell, self.size) for cell in self.queue.unfinished_cells()
        )
        return f"about {left / self._workers / 60:.0f} min left"
