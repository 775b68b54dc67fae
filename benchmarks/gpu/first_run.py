"""Find out in a few minutes on a GPU what works, what is exact, how fast and large a step is.

    python benchmarks/gpu/first_run.py [--minutes 8] [--out gpu-results.jsonl]
    python benchmarks/gpu/first_run.py --table --out gpu-results.jsonl    # print Markdown
    python benchmarks/gpu/first_run.py --toy --device cpu                 # rehearse the checks
    python benchmarks/gpu/first_run.py --only plan --device cpu           # predictions alone

One line of JSON per check is appended to the results file as soon as the check ends. The same
command again runs what is missing there: checks that were skipped, stopped by the time limit, or
never reached. A failing check does not end the run. Exit status: 0 when every check that ran is ok,
1 when a check failed, 2 when nothing can run.

This process imports no torch. It starts a worker process for the checks, a new one when a check
kills its process or hangs, and further processes for the memory plan's predictions.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # The checkout need not be installed. Its folders replace the folder of this script on the path,
    # whose modules are not top-level modules.
    root = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(root), str(root / "src")]

from benchmarks.gpu.check_catalog import catalog
from benchmarks.gpu.check_runner import TimeLimit, run_checks
from benchmarks.gpu.checks import Check
from benchmarks.gpu.process_supervisor import (
    CANNOT_RUN,
    SupervisedRun,
    child_environment,
    supervise,
)
from benchmarks.gpu.results_file import CheckResult, ResultsFile

# Module that the package's training imports -> the package to install.
REQUIRED = {
    "torch": "torch",
    "numpy": "numpy",
    "PIL": "pillow",
    "pydantic": "pydantic",
    "rich": "rich",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "optimi": "torch-optimi",
    "prodigyopt": "prodigyopt",
    "schedulefree": "schedulefree",
}


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="time limit of this run")
    add("--out", type=Path, default=Path("gpu-results.jsonl"), help="results file")
    add("--only", default="*", help="patterns of names or groups of checks, separated by ;")
    add("--retry", action="store_true", help="run checks that failed again")
    add("--toy", action="store_true", help="toy size: a rehearsal")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--list", action="store_true", help="print the checks in their order")
    add("--table", action="store_true", help="print the results file as Markdown")
    add("--role", choices=("worker", "planner"), help=argparse.SUPPRESS)
    add("--share", default="0/1", help=argparse.SUPPRESS)
    add("--started", type=float, default=None, help=argparse.SUPPRESS)
    add("--status-pipe", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    results = ResultsFile(options.out)
    checks = select_checks(options.only, options.toy)
    if options.list:
        for check in checks:
            print(f"{check.group:13} {check.expected_s:4.0f} s  {check.name}")
        return 0
    if options.table:
        from benchmarks.gpu.results_page import results_page

        print(results_page(results.read(), checks))
        return 0
    started = options.started or time.time()
    limit = TimeLimit(started, 60 * options.minutes, options.toy)
    with child_environment() as environment:
        arguments = child_arguments(options, started)
        run = SupervisedRun(checks, results, limit, options.device, arguments, environment)
        if options.role:
            return run_as_child(run, options)
        if problem := find_problem(options, checks):
            print(problem, file=sys.stderr)
            return CANNOT_RUN
        if options.retry:
            mark_failures_as_not_run(run)
        status = supervise(run)
    return status or print_summary(run)


def child_arguments(options: argparse.Namespace, started: float) -> list[str]:
    """Return the command line that gives a child process the same options."""
    named = {
        "--started": started,
        "--minutes": options.minutes,
        "--out": options.out,
        "--only": options.only,
        "--device": options.device,
    }
    arguments = [text for name, value in named.items() for text in (name, str(value))]
    return [*arguments, *(["--toy"] if options.toy else [])]


def select_checks(only: str, toy: bool) -> list[Check]:
    """Return the checks whose name or group matches one of the patterns.

    toy: leave out those that run the same code as another one.
    """
    patterns = [pattern.strip() for pattern in only.split(";")]

    def matches(check: Check) -> bool:
        names = (check.name, check.group)
        return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)

    return [
        check for check in catalog() if matches(check) and not (toy and check.skip_in_rehearsal)
    ]


def find_problem(options: argparse.Namespace, checks: Sequence[Check]) -> str:
    """Return one line that says why nothing can run, or ""; nothing is imported to find out."""
    missing = [
        package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if not checks:
        return f"no check matches {options.only!r}; --list prints all of them"
    if options.device == "cpu" and not (options.toy or all(check.background for check in checks)):
        return "without a GPU only a rehearsal (--toy) or the predictions (--only plan) can run"
    return ""


def mark_failures_as_not_run(run: SupervisedRun) -> None:
    results = run.results.read()
    for check in run.checks:
        if check.name in results and results[check.name].ok is False:
            reason = "it failed before and is to run again"
            run.results.append(CheckResult(check.name, check.group, None, reason=reason))


def run_as_child(run: SupervisedRun, options: argparse.Namespace) -> int:
    """Run the checks, or a share of the predictions, in a process that was started for it."""

    def report_current(name: str) -> None:
        if options.status_pipe is not None:
            os.write(options.status_pipe, f"{name}\n".encode())

    if options.role == "planner":
        os.nice(5)
        number, count = map(int, options.share.split("/"))
        # Shares of all predictions, not of the pending ones: those change while planners start.
        share = [check for check in run.checks if check.background][number::count]
        pending = [check for check in share if check.name not in run.results.done()]
        return run_checks(pending, run.results, run.limit, "cpu", report_current)
    try:
        import torch

        import simpletuner.training.run  # noqa: F401  (imports all that training needs)
    except ImportError as error:
        print(f"cannot import the package: {error}", file=sys.stderr)
        return CANNOT_RUN
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; --toy --device cpu rehearses on a CPU", file=sys.stderr)
        return CANNOT_RUN
    pending = run.pending(background=False)
    return run_checks(pending, run.results, run.limit, options.device, report_current)


def print_summary(run: SupervisedRun) -> int:
    """Print the failures and counts; return 1 when a check failed, else 0."""
    results = run.results.read()
    selected = [results[check.name] for check in run.checks if check.name in results]
    failed = [result for result in selected if result.ok is False]
    passed = [result for result in selected if result.ok]
    for result in failed:
        print(f"FAILED {result.name}: {result.reason}")
    rest = len(run.checks) - len(passed) - len(failed)
    print(f"{len(passed)} ok, {len(failed)} failed, {rest} not run: {run.results.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
