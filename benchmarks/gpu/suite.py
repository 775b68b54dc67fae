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
from benchmarks.gpu import ours, restore, theirs
from benchmarks.gpu.cases import FULL_SIZE, TOY, Case, World, cases
from benchmarks.gpu.meter import clean
from benchmarks.gpu.record import BEGUN, MEASURED, Record, environment
from benchmarks.gpu.table import page

from simpletuner.errors import SimpleTunerError
from simpletuner.training.device import shortage
from simpletuner.training.plan.speed import peak_flops

RESULTS = Path(__file__).parents[1] / "results"
KINDS: dict[str, Callable[[Case, World], dict[str, Any]]] = {
    "ours": ours.measure, "theirs": theirs.measure, "restore": restore.measure,
}  # fmt: skip
BEGIN_BEFORE = 0.9  # of the time: no case begins after it
COMPILE_BEFORE = 0.75  # of the time: compiling 57 blocks may take a minute
PLANNERS = 4  # processes; the step's own thread keeps a core to itself
DEATHS = 3  # after which the rest is left alone
FRESH = 3  # exit status of a child that wants a successor
MOST_LEFT_OVER = 100_000_000  # bytes; a later case's peak would hold them
TOY_PLANS = 2


def attempt(case: Case, world: World) -> tuple[str, dict[str, Any]]:
    """State and facts of one case. No exception is kept: its frames would hold the tensors."""
    started = time.monotonic()
    left_over = clean(torch.device(world.device))
    try:
        state, facts = MEASURED, {"measured": KINDS[case.kind](case, world)}
    except SimpleTunerError as error:
        state, facts = "refused", {"why": "; ".join(str(error).splitlines())}
    except (RuntimeError, MemoryError) as error:  # torch's own, its compiler's among them
        short = shortage(error)
        first = str(error).strip().splitlines()[:1]
        state = "out of memory" if short else "failed"
        facts = {"why": short or f"{type(error).__name__}: {''.join(first)}"}
    return state, {**facts, "left_over": left_over, "case_s": round(time.monotonic() - started, 1)}


def work(record: Record, chosen: Sequence[Case], world: World, begun: float, limit_s: float) -> int:
    """Every pending case that may still begin. begun, limit_s: on the wall's clock, shared by processes.

    FRESH where the rest wants another process: the device is out of order, or memory stays allocated.
    """
    device, done = torch.device(world.device), 0
    for case in record.pending(list(chosen)):
        share = (time.time() - begun) / limit_s
        if share > (COMPILE_BEFORE if case.compiled else BEGIN_BEFORE):
            continue
        if done and clean(device) > MOST_LEFT_OVER:
            return FRESH
        record.put(case, BEGUN)
        state, facts = attempt(case, world)
        record.put(case, state, **facts)
        print(f"{time.time() - begun:6.0f} s  {case.name}: {state} {told(facts)}", flush=True)
        done += 1
        if "CUDA error" in facts.get("why", ""):
            return FRESH
    return 0


def told(facts: dict[str, Any]) -> str:
    measured = facts.get("measured", {})
    if "step_s" not in measured:
        return str(facts.get("why", ""))
    allocated = measured["peak"].get("allocated", 0)
    return f"{measured['step_s']:.3f} s a step, {allocated / 1e9:.2f} GB"


def plan_of(case: Case, world: World) -> tuple[str, dict[str, Any]]:
    """Empty where there is no plan: what was measured is not lost over it."""
    try:
        return case.name, ours.planned(case, world)
    except (SimpleTunerError, RuntimeError) as error:
        print(f"{case.name}: no plan: {error}", flush=True)
        return case.name, {}


def stepped(chosen: Sequence[Case]) -> list[Case]:
    """Those that there is a plan for."""
    return [case for case in chosen if case.kind == "ours"]


def lower() -> None:
    os.nice(5)


def supervise(arguments: argparse.Namespace, file: Path, begun: float, limit_s: float) -> None:
    """A child for the cases, again when it dies; killed when the time is up."""
    given = ["--child", "--begun", str(begun), "--minutes", str(arguments.minutes), "--name", file.stem[4:],
             "--results", str(arguments.results)]  # fmt: skip
    given += ["--only", arguments.only] if arguments.only else []
    deaths = 0
    while deaths <= DEATHS and (left := begun + limit_s - time.time()) > 0:
        with subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.suite", *given]) as child:
            try:
                code = child.wait(left)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                Record(file).forget_begun()
                return
        if code == 0:
            return
        Record(file).bury()
        deaths += code != FRESH


def measure_all(
    arguments: argparse.Namespace, file: Path, chosen: list[Case], begun: float, limit_s: float
) -> dict[str, dict[str, Any]]:
    """Steps on the GPU in one process, plans on the CPU in others, as far as the time goes."""
    plans: dict[str, dict[str, Any]] = {}
    with multiprocessing.get_context("spawn").Pool(PLANNERS, initializer=lower) as pool:
        waiting = [pool.apply_async(plan_of, (case, FULL_SIZE)) for case in stepped(chosen)]
        supervise(arguments, file, begun, limit_s)
        for one in waiting:
            try:
                name, plan = one.get(max(0.1, begun + limit_s - time.time()))
                plans[name] = plan
            except multiprocessing.TimeoutError:
                break
    return plans


def name_of(device: str) -> str:
    name = torch.cuda.get_device_name(0) if device == "cuda" else "toy"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, in this process")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", help="cases whose name matches one of these patterns, after commas")
    parser.add_argument("--list", action="store_true", help="name the cases in their order and stop")
    parser.add_argument("--name", help="of the results, instead of the GPU's")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def matching(only: str | None) -> list[Case]:
    patterns = only.split(",") if only else ["*"]
    return [case for case in cases() if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    chosen = matching(arguments.only)
    if arguments.list or not chosen:
        print("\n".join(case.name for case in chosen or cases()))
        return 0 if arguments.list else 2
    world = TOY if arguments.toy else FULL_SIZE
    if world.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --toy rehearses all cases on the CPU", file=sys.stderr)
        return 2
    begun, limit_s = arguments.begun or time.time(), 60 * arguments.minutes
    file = arguments.results / f"gpu-{arguments.name or name_of(world.device)}.json"
    record = Record(file)
    gc.freeze()  # what is imported stays; looking through it at every case takes longer than a toy case
    if arguments.child:
        return work(record, chosen, world, begun, limit_s)
    command = shlex.join(["python", "-m", "benchmarks.gpu.suite", *(sys.argv[1:] if argv is None else argv)])
    record.environment = environment(world.device, command)
    record.bury()
    if arguments.toy:
        with torch.compiler.set_stance("force_eager"):  # tracing takes ten times as long as the rest
            work(record, chosen, world, begun, limit_s)
        plans = dict(plan_of(case, world) for case in stepped(chosen)[:TOY_PLANS])
    else:
        plans = measure_all(arguments, file, chosen, begun, limit_s)
        record = Record(file)
    finish(record, plans, chosen)
    gc.unfreeze()
    return 0


def finish(record: Record, plans: dict[str, dict[str, Any]], chosen: Sequence[Case]) -> None:
    """Plans beside what was measured, and the page."""
    for name, plan in plans.items():
        if name in record.rows:
            record.rows[name]["plan"] = plan
    record.environment["peak_flops"] = peak_flops(record.environment["gpu"])
    record.save()
    left = [case.name for case in record.pending(list(chosen))]
    record.file.with_suffix(".md").write_text(page(record, left), encoding="utf-8")
    print(record.file.with_suffix(".md"))


if __name__ == "__main__":
    sys.exit(main())
