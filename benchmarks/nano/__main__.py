"""Measure what the field argues about, on chroma-nano: the tables of benchmarks/nano/results.

    python -m benchmarks.nano                          all tables, three seeds: 75 minutes of two
    cores
    python -m benchmarks.nano --only lora --seeds 2    some of them, with fewer seeds
    python -m benchmarks.nano --list                   the cells in their order, with the seconds
    they take
    python -m benchmarks.nano --report                 the tables of what is finished, nothing is
    trained
    python -m benchmarks.nano --corner --out DIR       two-step cells through everything: the
    machinery
    python -m benchmarks.nano --only tune              a program of its own, as are captions and
    stopping

Every cell is a run folder in OUT/cells, trained by `simpletuner train`. The same command goes on:
finished cells are skipped, interrupted ones resume from their checkpoint, a failed one is reported and
stops no other. Tables are written when it ends or is interrupted, with as many seeds as are
finished.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nano import (
    captions,
    comparison_figure,
    comparison_page,
    densities_figure,
    densities_page,
    markdown_tables,
    methods,
    preservation,
    result_tables,
    stopping,
    tuning,
)
from benchmarks.nano.cell_runner import CellRunner, ExperimentFolders
from benchmarks.nano.cell_times import estimate_seconds
from benchmarks.nano.experiment_inputs import ROOT, base_fingerprint
from benchmarks.nano.experiments import (
    FULL_EXPERIMENT,
    SEEDS,
    SMOKE_TEST,
    TABLES,
    Cell,
    ExperimentSize,
    list_cells,
)

RESULTS, DOCS = ROOT / "benchmarks" / "nano" / "results", ROOT / "docs"
PAGE_NAME, FIGURE_NAME = "densities.md", "densities.svg"
COMPARISONS = ("methods", "preservation")  # tables with a page and a plot of their name in docs/
COMMAND = "python -m benchmarks.nano"


@dataclass(frozen=True)
class BenchmarkRequest:
    """What the command line says."""

    folders: ExperimentFolders
    size: ExperimentSize
    seeds: tuple[int, ...]
    only: tuple[str, ...]
    workers: int
    results: Path
    docs: Path
    command: str


def parse_arguments(words: Sequence[str]) -> tuple[argparse.Namespace, BenchmarkRequest]:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(TABLES), default=[], help="tables")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument(
        "--out", type=Path, default=ROOT / "output" / "benchmarks-nano", help="run folders"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument(
        "--corner", action="store_true", help="two steps, two prompts; tables go into OUT"
    )
    parser.add_argument("--list", action="store_true", help="say what would be done")
    parser.add_argument("--report", action="store_true", help="only write the tables")
    args = parser.parse_args(words)
    out = args.out.absolute()
    shown = [word for word in words if word not in ("--report", "--list")]
    seeds = SEEDS[: 1 if args.corner else args.seeds]
    asked = BenchmarkRequest(
        ExperimentFolders(out), SMOKE_TEST if args.corner else FULL_EXPERIMENT, seeds, tuple(args.only), args.workers,  # noqa: E501
        out / "results" if args.corner else RESULTS, out / "results" if args.corner else DOCS,
        COMMAND if args.corner or not shown else f"{COMMAND} {' '.join(strip_output_option(shown))}",
    )  # fmt: skip
    return args, asked


def strip_output_option(words: Sequence[str]) -> list[str]:
    """The command as a table tells it: where the runs lay is no part of it."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return kept


def main(words: Sequence[str]) -> int:
    for name, program in (("tune", tuning), ("captions", captions), ("stopping", stopping)):
        if list(words[:2]) == ["--only", name]:
            return program.main(words[2:])
    args, asked = parse_arguments(words)
    chosen = (
        smoke_test_cells(asked) if args.corner else list_cells(asked.size, asked.seeds, asked.only)
    )
    if args.list:
        print_cells(chosen, asked)
        return 0
    if args.report:
        write_reports(asked, chosen)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed: dict[str, str] = {}
    try:
        failed = CellRunner(
            asked.folders, asked.size, chosen, lambda line: print(line, flush=True)
        ).run(asked.workers)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", flush=True)
        failed = {"interrupted": "by a signal"}
    write_reports(asked, chosen)
    for name, why in failed.items():
        print(f"not finished: {name}: {why}", flush=True)
    return 1 if failed else 0


def smoke_test_cells(asked: BenchmarkRequest) -> list[Cell]:
    """A cell of every program and of every kind of data, and one that waits for others."""
    wanted = {"base", "lesson", "lesson-uniform", "trial-0.0001", "full-bf16-stochastic", "padded",
              "padded-used-trimmed", "shapes", "scratch-quadratic", "still-stratified",
              "rollout-50", "mixflow-0.8", "at-4-rollout-50",
              "still-independent", "methods-averaged", "methods-images-4",
              "preserve-base", "preserve-masked-base"}  # fmt: skip
    if "preservation" in asked.only:
        wanted |= {row.variant for row in preservation.ROWS}
    if "methods" in asked.only:
        wanted |= {row.variant for row in methods.own_rows()}
    return [
        cell
        for cell in list_cells(asked.size, asked.seeds, asked.only)
        if cell.variant.name in wanted
    ]


def print_cells(chosen: Sequence[Cell], asked: BenchmarkRequest) -> None:
    base = base_fingerprint()
    total = 0.0
    for cell in chosen:
        done = asked.folders.load_finished(cell, asked.size, base) is not None
        seconds = estimate_seconds(cell, asked.size)
        total += 0.0 if done else seconds
        print(f"{seconds:6.0f} s  {cell.name}{'  (finished)' if done else ''}")
    print(f"{total:6.0f} s of one core left; about {total / asked.workers / 60:.0f} minutes with "
          f"{asked.workers} side by side")  # fmt: skip


def write_reports(asked: BenchmarkRequest, chosen: Sequence[Cell]) -> None:
    """results/*.json and README.md of every table, the plot and the page of the densities."""
    base = base_fingerprint()
    every = list_cells(asked.size, asked.seeds)
    found = {cell.name: asked.folders.load_finished(cell, asked.size, base) for cell in every}
    done = {name: one for name, one in found.items() if one is not None}
    asked.results.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in TABLES if not asked.only or name in asked.only]
    for name in wanted:
        made = result_tables.build_table(name, done, asked.size, asked.seeds, asked.command, base)
        write_text(asked.results / f"{name}.json", json.dumps(made, indent=1) + "\n")
    files = [asked.results / f"{name}.json" for name in TABLES]
    known = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()
    }
    write_text(asked.results / "README.md", markdown_tables.render_page(list(known.values())))
    if "density" in known:
        write_text(asked.docs / FIGURE_NAME, densities_figure.render_figure(known["density"]))
        page = (DOCS / PAGE_NAME).read_text(encoding="utf-8")
        write_text(asked.docs / PAGE_NAME, densities_page.update_page(page, known["density"]))
    for name in COMPARISONS:
        if name in known:
            write_comparison(known[name], asked.docs)
    finished = sum(cell.name in done for cell in chosen)
    print(f"{finished} of {len(chosen)} cells are in {asked.results / 'README.md'}", flush=True)


def write_comparison(table: result_tables.TableData, docs: Path) -> None:
    """The plot of a table and its part of the guide of the same name."""
    name = table["table"]
    if comparison_page.is_measured(table):
        write_text(docs / f"{name}.svg", comparison_figure.render_figure(table))
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    write_text(docs / f"{name}.md", comparison_page.update_page(page, table, f"{name}.svg"))


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
