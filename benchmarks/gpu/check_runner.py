"""Run checks one after the other and write a result for each; no failure ends the run.

The supervising process is informed when a check starts, so that it can kill one that hangs.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.checks import Check, Outcome
from benchmarks.gpu.results_file import CheckResult, ResultsFile

# Exit statuses of a worker. RESTART asks for a new process: the CUDA context of this one is broken,
# or memory that it cannot free would spoil later peaks.
DONE = 0
RESTART = 3
MAX_LEFT_OVER_BYTES = 2_000_000_000
TRACEBACK_LINES = 12
MAX_TOY_S = 1.0


@dataclass(frozen=True)
class TimeLimit:
    """The time limit of a whole run, on the clock that processes share (`time.time`)."""

    started: float
    seconds: float
    toy: bool = False

    @property
    def deadline(self) -> float:
        return self.started + self.seconds

    def remaining_s(self) -> float:
        return self.deadline - time.time()

    def expected_s(self, check: Check) -> float:
        """Return the expected duration of a check at the size of this run."""
        return min(check.expected_s, MAX_TOY_S) if self.toy else check.expected_s


def run_checks(
    checks: Sequence[Check],
    results: ResultsFile,
    limit: TimeLimit,
    device: str,
    report_current: Callable[[str], None] = lambda name: None,
) -> int:
    """Run the checks that fit in the time and return DONE or RESTART.

    report_current: receives the name of a check when it starts and "" when it ends.
    """
    import torch
    from benchmarks.gpu.timing import free_memory
    from benchmarks.gpu.workload import make_workload

    workload = make_workload(limit.toy, device)
    threads = torch.get_num_threads()
    if limit.toy:
        torch.set_num_threads(1)  # threads wait for each other longer than toy tensors take
    gc.freeze()  # otherwise each collection walks through everything that was imported
    try:
        for check in checks:
            if skipped := skip_result(check, limit):
                results.append(skipped)
                continue
            if free_memory(workload.device) > MAX_LEFT_OVER_BYTES:
                return RESTART
            report_current(check.name)
            result = run_check(check, lambda: check.run(workload), limit)  # noqa: B023
            results.append(result)
            report_current("")
            elapsed = time.time() - limit.started
            print(f"{elapsed:6.1f} s  {result.status:7} {check.name}  {result.reason}", flush=True)
            if "CUDA error" in result.reason + result.error:
                return RESTART
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
    return DONE


def skip_result(check: Check, limit: TimeLimit) -> CheckResult | None:
    """Return a result with the reason when the check cannot run, None when it can."""
    expected_s = limit.expected_s(check)
    remaining_s = limit.remaining_s()
    missing = check.missing_packages()
    if missing:
        reason = f"not installed: {', '.join(missing)}"
    elif expected_s > remaining_s:
        reason = f"it takes about {expected_s:.0f} s, and {max(0.0, remaining_s):.0f} s remain"
    else:
        return None
    return CheckResult(check.name, check.group, None, expected_s=expected_s, reason=reason)


def run_check(check: Check, function: Callable[[], Outcome], limit: TimeLimit) -> CheckResult:
    """Call the function of a check and return its result, also when it raises.

    The exception itself is dropped: its frames would keep tensors alive.
    """
    started = time.monotonic()
    figures: dict[str, Any] = {}
    error = ""
    try:
        outcome = function()
        ok = outcome.ok
        figures = outcome.figures
        reason = "; ".join(outcome.failures)
    except Exception as exception:  # any failure belongs to this check and must not end the run
        ok = False
        first_line = next(iter(str(exception).strip().splitlines()), "")
        reason = f"{type(exception).__name__}: {first_line}"
        lines = "".join(traceback.format_exception(exception)).splitlines()
        error = "\n".join(lines[-TRACEBACK_LINES:])
    seconds = round(time.monotonic() - started, 2)
    expected_s = limit.expected_s(check)
    return CheckResult(check.name, check.group, ok, seconds, expected_s, figures, reason, error)
