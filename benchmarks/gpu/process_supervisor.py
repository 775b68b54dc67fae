"""The processes of a run: one runs the checks, others compute predictions, this one supervises.

Standard library only. A check may kill its process (a segmentation fault), break the CUDA context
(an illegal memory access) or hang: each costs a new process and a result with the reason, no more.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.check_runner import DONE, RESTART, TimeLimit
from benchmarks.gpu.checks import Check
from benchmarks.gpu.results_file import CheckResult, ResultsFile

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("first_run.py")
CANNOT_RUN = 2
MAX_LOST_PROCESSES = 5  # after so many, the remaining checks are not run
MAX_PLANNERS = 3
SIGNAL_NAMES = {-number.value: number.name for number in signal.Signals}


@dataclass(frozen=True)
class SupervisedRun:
    """The checks that were chosen, where their results go, and what child processes are given.

    device: "cuda" or "cpu". arguments: of the command line of each child, apart from its role.
    environment: of each child.
    """

    checks: Sequence[Check]
    results: ResultsFile
    limit: TimeLimit
    device: str
    arguments: Sequence[str]
    environment: Mapping[str, str]

    def pending(self, background: bool) -> list[Check]:
        """Return the checks without a result, in order."""
        done = self.results.done()
        return [
            check
            for check in self.checks
            if check.background == background and check.name not in done
        ]


@contextlib.contextmanager
def child_environment() -> Iterator[dict[str, str]]:
    """Yield the environment of the child processes.

    It has an empty compiler cache, so that compilation is timed cold; the cuBLAS workspaces that
    torch's deterministic algorithms require (32 MiB, as large as Hopper's default); no hub.
    """
    with tempfile.TemporaryDirectory(prefix="inductor-", ignore_cleanup_errors=True) as folder:
        paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        yield {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }


def supervise(run: SupervisedRun) -> int:
    """Run a worker (a new one whenever it ends early) and planners; return 0 or CANNOT_RUN.

    Planners are killed when the worker ends, because a GPU should not be held for them: missing
    predictions can be computed without one.
    """
    former = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    waiting = len(run.pending(background=True))
    # Two cores are left to the worker; on a machine with two or fewer, one planner shares them.
    count = min(max(1, min(MAX_PLANNERS, (os.cpu_count() or 2) - 2)), waiting)
    planners = [start_child(run, "planner", ["--share", f"{at}/{count}"]) for at in range(count)]
    try:
        if run.pending(background=False):
            return run_workers(run)
        for planner in planners:
            with contextlib.suppress(subprocess.TimeoutExpired):
                planner.wait(max(0.0, run.limit.remaining_s()))
    finally:
        for planner in planners:
            kill_process_group(planner)
        signal.signal(signal.SIGTERM, former)
    return 0


def run_workers(run: SupervisedRun) -> int:
    """Run workers until every check has its turn or the time is up; return 0 or CANNOT_RUN."""
    lost = 0
    while lost < MAX_LOST_PROCESSES and run.pending(background=False) and not time_is_up(run):
        status = run_worker(run)
        if status == CANNOT_RUN:
            return CANNOT_RUN
        if status == DONE:
            break
        lost += status != RESTART
    return 0


def time_is_up(run: SupervisedRun) -> bool:
    return run.limit.remaining_s() <= 0


def start_child(
    run: SupervisedRun, role: str, more: Sequence[str], status_pipe: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a process of this run in a process group of its own.

    status_pipe: a file descriptor that the child inherits to report the current check.
    """
    command = [sys.executable, str(SCRIPT), *run.arguments, "--role", role, *more]
    inherited = () if status_pipe is None else (status_pipe,)
    return subprocess.Popen(
        command, env=dict(run.environment), pass_fds=inherited, start_new_session=True
    )


def kill_process_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a child with its own children, if any of them still runs."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_worker(run: SupervisedRun) -> int:
    """Run one worker and return its exit status.

    A check whose process ended early gets a result with the reason.
    """
    reading, writing = os.pipe()
    process = start_child(run, "worker", ["--status-pipe", str(writing)], writing)
    os.close(writing)
    try:
        current, started, why_killed = follow_worker(run, reading)
        status = -signal.SIGKILL if why_killed else process.wait()
    finally:
        os.close(reading)
        kill_process_group(process)
    if current is not None and status not in (DONE, RESTART, CANNOT_RUN):
        run.results.append(interrupted_result(current, time.time() - started, why_killed, status))
    return status


def follow_worker(run: SupervisedRun, reading: int) -> tuple[Check | None, float, str]:
    """Wait for a worker; return its current check, when that started, and why to kill the worker.

    The worker writes a line with the name of a check when it starts and an empty line when it ends.
    The reason is "" when the worker ended by itself, "time" when the run's time is up, and "hung"
    when the check takes longer than its own limit.
    """
    by_name = {check.name: check for check in run.checks}
    current = None
    started = time.time()
    unread = b""
    while True:
        remaining_s = run.limit.remaining_s()
        if remaining_s <= 0:
            return current, started, "time"
        if current is not None:
            remaining_s = min(remaining_s, started + current.limit_s - time.time())
            if remaining_s <= 0:
                return current, started, "hung"
        if not select.select([reading], [], [], remaining_s)[0]:
            continue
        piece = os.read(reading, 4096)
        if not piece:
            return current, started, ""
        *lines, unread = (unread + piece).split(b"\n")
        if lines:
            current = by_name.get(lines[-1].decode())
            started = time.time()


def interrupted_result(check: Check, seconds: float, why_killed: str, status: int) -> CheckResult:
    """Return the result of a check whose process ended before it."""
    ok: bool | None = False
    if why_killed == "time":
        ok = None
        reason = f"stopped by the time limit after {seconds:.0f} s"
    elif why_killed == "hung":
        reason = f"killed after {seconds:.0f} s: about {check.expected_s:.0f} s were expected"
    else:
        end = SIGNAL_NAMES.get(status, f"exit status {status}")
        reason = f"the process ended during this check: {end}"
    seconds = round(seconds, 2)
    return CheckResult(check.name, check.group, ok, seconds, check.expected_s, reason=reason)
