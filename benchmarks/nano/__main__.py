"""Measure what the field argues about, on chroma-nano: the tables of benchmarks/nano/results.

    python -m benchmarks.nano                          all tables, three seeds: 75 minutes of two cores
    python -m benchmarks.nano --only lora --seeds 2    some of them, with fewer seeds
    python -m benchmarks.nano --list                   the cells in their order, with the seconds they take
    python -m benchmarks.nano --report                 the tables of what is finished, nothing is trained
    python -m benchmarks.nano --corner --out DIR       two-step cells through everything: the machinery

Every cell is a run folder in OUT/cells, trained by `simpletuner train`. The same command goes on: finished
cells are skipped, interrupted ones resume from their checkpoint, a failed one is told and stops no other.
Tables are written when it ends or is interrupted, with as many seeds as are finished.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nano import figure, markdown, story, tables
from benchmarks.nano.plan import CORNER, SEEDS, TABLES, WHOLE, Cell, Size, cells, estimate_s
from benchmarks.nano.work import Folders, Runner
from benchmarks.nano.world import ROOT, base_fingerprint

RESULTS, DOCS = ROOT / "benchmarks" / "nano" / "results", ROOT / "docs"
PAGE, PLOT = "densities.md", "densities.svg"
COMMAND = "python -m benchmarks.nano"


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    folders: Folders
    size: Size
    seeds: tuple[int, ...]
    only: tuple[str, ...]
    workers: int
    results: Path
    docs: Path
    command: str


def arguments(words: Sequence[str]) -> tuple[argparse.Namespace, Asked]:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(TABLES), default=[], help="tables")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "benchmarks-nano", help="run folders")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--corner", action="store_true", help="two steps, two prompts; tables go into OUT")
    parser.add_argument("--list", action="store_true", help="say what would be done")
    parser.add_argument("--report", action="store_true", help="only write the tables")
    args = parser.parse_args(words)
    out = args.out.absolute()
    shown = [word for word in words if word not in ("--report", "--list")]
    seeds = SEEDS[: 1 if args.corner else args.seeds]
    asked = Asked(
        Folders(out), CORNER if args.corner else WHOLE, seeds, tuple(args.only), args.workers,
        out / "results" if args.corner else RESULTS, out / "results" if args.corner else DOCS,
        COMMAND if args.corner or not shown else f"{COMMAND} {' '.join(without_folders(shown))}",
    )  # fmt: skip
    return args, asked


def without_folders(words: Sequence[str]) -> list[str]:
    """The command as a table tells it: where the runs lay is no part of it."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return kept


def main(words: Sequence[str]) -> int:
    args, asked = arguments(words)
    chosen = corner(asked) if args.corner else cells(asked.size, asked.seeds, asked.only)
    if args.list:
        listing(chosen, asked)
        return 0
    if args.report:
        report(asked, chosen)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed: dict[str, str] = {}
    try:
        failed = Runner(asked.folders, asked.size, chosen, lambda line: print(line, flush=True)).run(
            asked.workers
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", flush=True)
        failed = {"interrupted": "by a signal"}
    report(asked, chosen)
    for name, why in failed.items():
        print(f"not finished: {name}: {why}", flush=True)
    return 1 if failed else 0


def corner(asked: Asked) -> list[Cell]:
    """A cell of every program and of every kind of data, and one that waits for others."""
    wanted = {"base", "lesson", "lesson-uniform", "trial-0.0001", "full-bf16-stochastic", "padded",
              "padded-used-trimmed", "shapes", "scratch-quadratic", "still-stratified",
              "still-independent"}  # fmt: skip
    return [cell for cell in cells(asked.size, asked.seeds, asked.only) if cell.variant.name in wanted]


def listing(chosen: Sequence[Cell], asked: Asked) -> None:
    base = base_fingerprint()
    total = 0.0
    for cell in chosen:
        done = asked.folders.finished(cell, asked.size, base) is not None
        seconds = estimate_s(cell, asked.size)
        total += 0.0 if done else seconds
        print(f"{seconds:6.0f} s  {cell.name}{'  (finished)' if done else ''}")
    print(f"{total:6.0f} s of one core left; about {total / asked.workers / 60:.0f} minutes with "
          f"{asked.workers} side by side")  # fmt: skip


def report(asked: Asked, chosen: Sequence[Cell]) -> None:
    """results/*.json and README.md of every table, the plot and the page of the densities."""
    base = base_fingerprint()
    every = cells(asked.size, asked.seeds)
    found = {cell.name: asked.folders.finished(cell, asked.size, base) for cell in every}
    done = {name: one for name, one in found.items() if one is not None}
    asked.results.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in TABLES if not asked.only or name in asked.only]
    for name in wanted:
        made = tables.table(name, done, asked.size, asked.seeds, asked.command, base)
        write(asked.results / f"{name}.json", json.dumps(made, indent=1) + "\n")
    files = [asked.results / f"{name}.json" for name in TABLES]
    known = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()}
    write(asked.results / "README.md", markdown.page(list(known.values())))
    if "density" in known:
        write(asked.docs / PLOT, figure.draw(known["density"]))
        page = (DOCS / PAGE).read_text(encoding="utf-8")
        write(asked.docs / PAGE, story.told(page, known["density"]))
    finished = sum(cell.name in done for cell in chosen)
    print(f"{finished} of {len(chosen)} cells are in {asked.results / 'README.md'}", flush=True)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
