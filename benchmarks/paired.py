"""Compare the times of two ways of doing the same work, pair by pair.

Other work on the machine slows whatever runs beside it, and its load changes within seconds. So
both ways run in one process, in turn: ours, theirs, ours, theirs. Each pair gives one ratio, and
the median of the ratios is reported with the first and third quartiles. A ratio of two minima has
no such spread: it cannot show that it rests on one lucky run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Clock = Callable[[], float]
CLOCKS: tuple[Clock, Clock] = (time.process_time, time.perf_counter)
PAIRS = 7


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: of the process's CPU, all threads together, and of the wall clock."""

    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Comparison:
    """The runs of both ways; those at the same index are a pair."""

    ours: tuple[Timing, ...]
    theirs: tuple[Timing, ...]

    def both(self) -> dict[str, dict[str, float]]:
        """Return both summaries, for work that waits for a disk or uses threads."""
        return {"cpu": self.cpu(), "wall": self.wall()}

    def cpu(self) -> dict[str, float]:
        """Return the summary of the CPU times; see `summarize`."""
        return summarize([run.cpu_s for run in self.ours], [run.cpu_s for run in self.theirs])

    def wall(self) -> dict[str, float]:
        """Return the summary of the wall times, in which other work on the machine counts."""
        return summarize([run.wall_s for run in self.ours], [run.wall_s for run in self.theirs])


def time_call(work: Callable[[], object], clocks: tuple[Clock, Clock] = CLOCKS) -> Timing:
    cpu, wall = clocks
    cpu_start, wall_start = cpu(), wall()
    work()
    return Timing(cpu() - cpu_start, wall() - wall_start)


def compare(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    pairs: int = PAIRS,
    *,
    warmup: int = 1,
    before: Callable[[], object] = lambda: None,
    clocks: tuple[Clock, Clock] = CLOCKS,
) -> Comparison:
    """Run both in turn, `warmup` + `pairs` times; the times of the warm-up are dropped.

    before: runs, untimed, ahead of every single run.
    """
    if pairs < 2:
        raise ValueError(f"{pairs} pairs have no quartiles: give 2 or more")
    runs: dict[str, list[Timing]] = {"ours": [], "theirs": []}
    for _ in range(warmup + pairs):
        for name, work in (("ours", ours), ("theirs", theirs)):
            before()
            runs[name].append(time_call(work, clocks))
    return Comparison(tuple(runs["ours"][warmup:]), tuple(runs["theirs"][warmup:]))


def summarize(ours_s: list[float], theirs_s: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of ours / theirs, pair by pair, and the median seconds.

    A ratio below 1 says that ours is faster.
    """
    if min(theirs_s) <= 0:
        raise ValueError("the clock did not advance: the work of one run is too short")
    ratios = [mine / other for mine, other in zip(ours_s, theirs_s, strict=True)]
    first, middle, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "pairs": len(ratios),
        "ratio": round(middle, 3),
        "ratio_q1": round(first, 3),
        "ratio_q3": round(third, 3),
        "ours_s": round(statistics.median(ours_s), 6),
        "theirs_s": round(statistics.median(theirs_s), 6),
    }


def environment() -> dict[str, object]:
    """Return what a time depends on besides the code."""
    return {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cpu_model": cpu_model(Path("/proc/cpuinfo")),
    }


def cpu_model(cpuinfo: Path) -> str:
    """Return the processor's name from Linux' list, or the platform's own word for it elsewhere."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def add_pairs(parser: argparse.ArgumentParser, pairs: int = PAIRS) -> None:
    parser.add_argument("--pairs", type=int, default=pairs, help=f"pairs of runs; default: {pairs}")
