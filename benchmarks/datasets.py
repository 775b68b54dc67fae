"""Scan, inspection and first training step of the same images in a folder, in tar files and in a table.

    python -m benchmarks.datasets [--images 10000] [--side-px 160] [--sources local tar parquet]
                                  [--no-training] [--out benchmarks/results/datasets.md]

One JSON line per source, [wall, CPU] seconds of whole processes with a warm file cache: `simpletuner inspect
--headers-only`, `simpletuner inspect`, and `simpletuner train` on chroma-nano to its first step, with
the seconds of its stages. Images are encoded once before the first step, which is most of it; the
caches of the sources are separate. Half of the images are PNG, half JPEG. --out writes the table of the
sources that are finished, after each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paired import environment
from benchmarks.scan import draw

from simpletuner.events import event_types
from simpletuner.events.event_log import read_events

TAR_FILES = 4
OPTIONS: Mapping[str, object] = {
    "model_flavour": "nano",
    "resolution": 128,
    "resolution_type": "pixel",
    "max_train_steps": 1,
    "validation_disable": True,
    "validation_split": 0,
    "lora_rank": 4,
    "vae_batch_size": 16,
    "text_encoder_batch_size": 64,
}


def make_tars(images: Path, folder: Path) -> dict[str, object]:
    """Divide the files among TAR_FILES tar files, images next to their captions."""
    folder.mkdir()
    stems = sorted({path.stem for path in images.iterdir()})
    for number in range(TAR_FILES):
        with tarfile.open(folder / f"{number:03}.tar", "w") as archive:
            for stem in stems[number::TAR_FILES]:
                for path in sorted(images.glob(f"{stem}.*")):
                    archive.add(path, path.name)
    return {"type": "webdataset", "instance_data_dir": str(folder)}


def make_table(images: Path, folder: Path) -> dict[str, object]:
    """Write a parquet table of paths and captions."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    paths = sorted(path for path in images.iterdir() if path.suffix != ".txt")
    rows = [
        {"path": str(path), "caption": path.with_suffix(".txt").read_text("utf-8").strip()}
        for path in paths
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return {
        "type": "parquet",
        "table": str(folder / "rows.parquet"),
        "instance_data_dir": str(images),
    }


SOURCES: Mapping[str, Callable[[Path, Path], dict[str, object]]] = {
    "local": lambda images, folder: {"instance_data_dir": str(images)},
    "tar": make_tars,
    "parquet": make_table,
}


# Heading of the table -> the key of a result whose [wall, CPU] seconds it shows.
COMMANDS: Mapping[str, str] = {
    "inspect, headers only": "inspect_headers_s",
    "inspect, with a page": "inspect_s",
    "train to the first step": "first_step_s",
}


def run_command(words: list[str]) -> tuple[float, float]:
    """Run `simpletuner`; return its wall and CPU seconds. Raises RuntimeError with its last line."""
    started, before = time.monotonic(), children_cpu_s()
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return round(time.monotonic() - started, 2), round(children_cpu_s() - before, 2)


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_source(name: str, images: Path, root: Path, trains: bool) -> dict[str, object]:
    entry = SOURCES[name](images, root / name)
    datasets = root / f"{name}.json"
    datasets.write_text(json.dumps([{"id": name, **entry}]), encoding="utf-8")
    options = {
        **OPTIONS,
        "data_backend_config": str(datasets),
        "output_dir": str(root / f"{name}-run"),
    }
    config = root / f"{name}-config.json"
    config.write_text(json.dumps(options), encoding="utf-8")
    words = ["inspect", "--config", str(config), "--json"]
    headers_s = run_command([*words, "--headers-only"])
    full_s = run_command([*words, "--html", str(root / f"{name}.html")])
    result: dict[str, object] = {
        "benchmark": "datasets",
        "source": name,
        "inspect_headers_s": headers_s,
        "inspect_s": full_s,
        "page_mb": round((root / f"{name}.html").stat().st_size / 1e6, 2),
    }
    if not trains:
        return result
    train_s = run_command(["train", "--config", str(config)])
    records = [record.event for record in read_events(root / f"{name}-run" / "events.jsonl")]
    stages = {
        event.stage: round(event.seconds, 2)
        for event in records
        if isinstance(event, event_types.StageCompleted)
    }
    assert any(isinstance(event, event_types.StepCompleted) for event in records)
    return {**result, "first_step_s": train_s, "stages_s": stages}


def render_table(results: Sequence[Mapping[str, Any]], command: str) -> str:
    """Return the page of benchmarks/results: a column for each source."""
    first = results[0]
    names = [str(result["source"]) for result in results]
    stages = [*dict.fromkeys(stage for result in results for stage in result.get("stages_s", {}))]
    rows = [
        [f"{heading}: {clock} s", *(_format_s(result.get(key), at) for result in results)]
        for heading, key in COMMANDS.items()
        for at, clock in enumerate(("wall", "CPU"))
    ]
    for stage in stages:
        seconds = [result.get("stages_s", {}).get(stage) for result in results]
        rows.append([f"of which {stage}: wall s", *map(_format_s, seconds)])
    rows.append(["page of inspect, MB", *(f"{result['page_mb']:.1f}" for result in results)])
    lines = [["", *names], ["---", *("---:" for _ in names)], *rows]
    return "\n".join(
        [
            "# The same images in a folder, in tar files and in a parquet table",
            "",
            f"    {command}",
            "",
            f"{first['images']:,} images, half PNG, half JPEG, {TAR_FILES} tar files; whole processes with a "
            "warm file cache and empty caches of latents and texts, chroma-nano, "
            f"torch {first['torch']}, {first['cpu_model']}. CPU seconds are those of all threads; wall "
            "seconds contain what other work on the machine took.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
        ]
    )


def _format_s(seconds: Sequence[float] | float | None, at: int = 0) -> str:
    if seconds is None:
        return "not run"
    return f"{seconds if isinstance(seconds, (int, float)) else seconds[at]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side-px", type=int, default=160)
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--no-training", action="store_true", help="inspect only")
    parser.add_argument("--out", type=Path, help="file of the table")
    arguments = parser.parse_args()
    results: list[dict[str, object]] = []
    command = (
        f"python -m benchmarks.datasets --images {arguments.images} --side-px {arguments.side_px}"
    )
    with tempfile.TemporaryDirectory() as name:
        images = Path(name, "images")
        images.mkdir()
        draw(images, arguments.images, arguments.side_px)
        for source in arguments.sources:
            measured = measure_source(source, images, Path(name), not arguments.no_training)
            results.append({**measured, "images": arguments.images, **environment()})
            print(json.dumps(results[-1]), flush=True)
            if arguments.out is not None:
                arguments.out.write_text(render_table(results, command), encoding="utf-8")


if __name__ == "__main__":
    main()
