"""How long a person waits: help, a mistake in a config, a cold and a warm start of the bundled
example.

    python benchmarks/startup.py

One JSON line per measurement: CPU seconds (user + system, children included) and wall seconds.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(name: str, arguments: list[str], folder: Path, expected: int) -> None:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        raise SystemExit(
            f"{name} ended with {done.returncode}, not {expected}:\n{done.stdout}{done.stderr}"
        )
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"what": name, "cpu_s": round(cpu, 3), "wall_s": round(wall, 3)}), flush=True)


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "2"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text('{\n  "learning_rat": 1e-4\n}\n')
        measure("simpletuner --help", ["--help"], folder, 0)
        measure("simpletuner train --help", ["train", "--help"], folder, 0)
        measure("simpletuner train, misspelt option", ["train"], folder, 2)
        short = [
            "train",
            "--example",
            "chroma-nano.peft-lora",
            "--max_train_steps=1",
            "--validation_disable",
        ]
        out = f"--output_dir={folder / 'run'}"
        measure("one step of the example, empty caches", [*short, out], folder, 0)
        measure("the same command again: nothing left to do", [*short, out], folder, 0)
        warm = [
            *short,
            f"--output_dir={folder / 'again'}",
            f"--cache_dir={folder / 'run' / 'cache'}",
        ]
        measure("one step of the example, caches filled", warm, folder, 0)


if __name__ == "__main__":
    main()
