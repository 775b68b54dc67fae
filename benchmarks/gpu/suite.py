"""Memory and time of a training step on one GPU: every precision, beside the usual step and our own plan.

    python -m benchmarks.gpu.suite                  # nine minutes; the same command goes on where it was
    python -m benchmarks.gpu.suite --only 'ours nf4*' --minutes 3
    python -m benchmarks.gpu.suite --toy            # all cases at toy size on the CPU

Full-size Chroma with random weights drawn on the device: no file, no hub. Writes gpu-<name>.json after each
case and gpu-<name>.md at the end, into benchmarks/results. One child process works through the cases, and is
started again after a case that took it along; plans are made on other cores meanwhile. What runs out of
memory, or is refused, is a row that says so.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import dequantize_speed, diffusers_step, simpletuner_step
from benchmarks.gpu.cases import FULL_SIZE, TOY_SIZE, Case, SuiteSize, all_cases
from benchmarks.gpu.measurement_record import MEASURED, STARTED, MeasurementRecord, describe_environment
from benchmarks.gpu.results_page import render_page
from benchmarks.gpu.step_meter import reset_device

from simpletuner.errors import SimpleTunerError
from simpletuner.training.device import describe_out_of_memory
from simpletuner.training.memory_plan.step_time import peak_flops

RESULTS_DIR = Path(__file__).parents[1] / "results"
MEASURE_BY_KIND: dict[str, Callable[[Case, SuiteSize], dict[str, Any]]] = {
    "ours": simpletuner_step.measure, "theirs": diffusers_step.measure, "restore": dequantize_speed.measure,
}  # fmt: skip
LAST_START_FRACTION = 0.9  # of the time: no case begins after it
LAST_COMPILE_FRACTION = 0.75  # of the time: compiling 57 blocks may take a minute
PLAN_PROCESSES = 4  # processes; the step's own thread keeps a core to itself
MAX_CRASHES = 3  # after which the rest is left alone
EXIT_RESTART_CHILD = 3  # exit status of a child that wants a successor
MAX_LEFTOVER_BYTES = 100_000_000  # bytes; a later case's peak would hold them
TOY_PLANS = 2


def run_case(case: Case, world: SuiteSize) -> tuple[str, dict[str, Any]]:
    """State and facts of one case. No exception is kept: its frames would hold the tensors."""
    started = time.monotonic()
    left_over = reset_device(torch.device(world.device))
    try:
        state, facts = MEASURED, {"measured": MEASURE_BY_KIND[case.kind](case, world)}
    except SimpleTunerError as error:
        state, facts = "refused", {"why": "; ".join(str(error).splitlines())}
    except (RuntimeError, MemoryError) as error:  # torch's own, its compiler's among them
        short = describe_out_of_memory(error)
        first = str(error).strip().splitlines()[:1]
        state = "out of memory" if short else "failed"
        facts = {"why": short or f"{type(error).__name__}: {''.join(first)}"}
    return state, {**facts, "left_over": left_over, "case_s": round(time.monotonic() - started, 1)}


def run_pending_cases(
    record: MeasurementRecord, chosen: Sequence[Case], world: SuiteSize, begun: float, limit_s: float
) -> int:
    """Every pending case that may still begin. begun, limit_s: on the wall's clock, shared by processes.

    FRESH where the rest wants another process: the device is out of order, or memory stays allocated.
    """
    device, done = torch.device(world.device), 0
    for case in record.pending_cases(list(chosen)):
        share = (time.time() - begun) / limit_s
        if share > (LAST_COMPILE_FRACTION if case.compiled else LAST_START_FRACTION):
            continue
        if done and reset_device(device) > MAX_LEFTOVER_BYTES:
            return EXIT_RESTART_CHILD
        record.update_row(case, STARTED)
        state, facts = run_case(case, world)
        record.update_row(case, state, **facts)
        print(f"{time.time() - begun:6.0f} s  {case.name}: {state} {format_outcome(facts)}", flush=True)
        done += 1
        if "CUDA error" in facts.get("why", ""):
            return EXIT_RESTART_CHILD
    return 0


def format_outcome(facts: dict[str, Any]) -> str:
    measured = facts.get("measured", {})
    if "step_s" not in measured:
        return str(facts.get("why", ""))
    allocated = measured["peak"].get("allocated", 0)
    return f"{measured['step_s']:.3f} s a step, {allocated / 1e9:.2f} GB"


def plan_case(case: Case, world: SuiteSize) -> tuple[str, dict[str, Any]]:
    """Empty where there is no plan: what was measured is not lost over it."""
    try:
        return case.name, simpletuner_step.predict_step(case, world)
    except (SimpleTunerError, RuntimeError) as error:
        print(f"{case.name}: no plan: {error}", flush=True)
        return case.name, {}


def cases_with_plan(chosen: Sequence[Case]) -> list[Case]:
    """Those that there is a plan for."""
    return [case for case in chosen if case.kind == "ours"]


def lower_priority() -> None:
    os.nice(5)


def supervise_child(arguments: argparse.Namespace, file: Path, begun: float, limit_s: float) -> None:
    """A child for the cases, again when it dies; killed when the time is up."""
    given = ["--child", "--begun", str(begun), "--minutes", str(arguments.minutes), "--name", file.stem[4:],
             "--results", str(arguments.results)]  # fmt: skip
    given += ["--only", arguments.only] if arguments.only else []
    deaths = 0
    while deaths <= MAX_CRASHES and (left := begun + limit_s - time.time()) > 0:
        with subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.suite", *given]) as child:
            try:
                code = child.wait(left)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                MeasurementRecord(file).drop_started()
                return
        if code == 0:
            return
        MeasurementRecord(file).mark_crashed()
        deaths += code != EXIT_RESTART_CHILD


def measure_all(
    arguments: argparse.Namespace, file: Path, chosen: list[Case], begun: float, limit_s: float
) -> dict[str, dict[str, Any]]:
    """Steps on the GPU in one process, plans on the CPU in others, as far as the time goes."""
    plans: dict[str, dict[str, Any]] = {}
    with multiprocessing.get_context("spawn").Pool(PLAN_PROCESSES, initializer=lower_priority) as pool:
        waiting = [pool.apply_async(plan_case, (case, FULL_SIZE)) for case in cases_with_plan(chosen)]
        supervise_child(arguments, file, begun, limit_s)
        for one in waiting:
            try:
                name, plan = one.get(max(0.1, begun + limit_s - time.time()))
                plans[name] = plan
            except multiprocessing.TimeoutError:
                break
    return plans


def device_file_name(device: str) -> str:
    name = torch.cuda.get_device_name(0) if device == "cuda" else "toy"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, in this process")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", help="cases whose name matches one of these patterns, after commas")
    parser.add_argument("--list", action="store_true", help="name the cases in their order and stop")
    parser.add_argument("--name", help="of the results, instead of the GPU's")
    parser.add_argument("--results", type=Path, default=RESULTS_DIR)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def select_cases(only: str | None) -> list[Case]:
    patterns = only.split(",") if only else ["*"]
    return [case for case in all_cases() if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    chosen = select_cases(arguments.only)
    if arguments.list or not chosen:
        print("\n".join(case.name for case in chosen or all_cases()))
        return 0 if arguments.list else 2
    world = TOY_SIZE if arguments.toy else FULL_SIZE
    if world.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --toy rehearses all cases on the CPU", file=sys.stderr)
        return 2
    begun, limit_s = arguments.begun or time.time(), 60 * arguments.minutes
    file = arguments.results / f"gpu-{arguments.name or device_file_name(world.device)}.json"
    record = MeasurementRecord(file)
    gc.freeze()  # what is imported stays; looking through it at every case takes longer than a toy case
    if arguments.child:
        return run_pending_cases(record, chosen, world, begun, limit_s)
    command = shlex.join(["python", "-m", "benchmarks.gpu.suite", *(sys.argv[1:] if argv is None else argv)])
    record.environment = describe_environment(world.device, command)
    record.mark_crashed()
    if arguments.toy:
        with torch.compiler.set_stance("force_eager"):  # tracing takes ten times as long as the rest
            run_pending_cases(record, chosen, world, begun, limit_s)
        plans = dict(plan_case(case, world) for case in cases_with_plan(chosen)[:TOY_PLANS])
    else:
        plans = measure_all(arguments, file, chosen, begun, limit_s)
        record = MeasurementRecord(file)
    write_results(record, plans, chosen)
    gc.unfreeze()
    return 0


def write_results(
    record: MeasurementRecord, plans: dict[str, dict[str, Any]], chosen: Sequence[Case]
) -> None:
    """Plans beside what was measured, and the page."""
    for name, plan in plans.items():
        if name in record.rows:
            record.rows[name]["plan"] = plan
    record.environment["peak_flops"] = peak_flops(record.environment["gpu"])
    record.save()
    left = [case.name for case in record.pending_cases(list(chosen))]
    record.file.with_suffix(".md").write_text(render_page(record, left), encoding="utf-8")
    print(record.file.with_suffix(".md"))


if __name__ == "__main__":
    sys.exit(main())
