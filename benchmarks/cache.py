"""Times of the caches against one torch.save file per sample.

    python -m benchmarks.cache [--samples 300] [--folder DIR] [--pairs 7]

One JSON line: writing (both synced to the disk), finding out that every key is there, and reading
in shuffled order with a warm page cache. Latents are float32 moments of a 512 px image, text is
120 rows of width 4096 in bfloat16. Ours also makes a checksum at writing and compares it at
reading. CPU and wall seconds for all samples; ratio is ours / files, the median of the pairs with
its quartiles (benchmarks/paired.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from benchmarks.paired import add_pairs, compare, environment
from torch import Tensor

from simpletuner.cache.tensor_store import TensorStore

KINDS: dict[str, Callable[[], Tensor]] = {
    "latents": lambda: torch.randn(32, 64, 64),
    "text": lambda: torch.randn(120, 4096).to(torch.bfloat16),
}
THREADS = 2


def write_store(folder: Path, keys: list[str], value: Tensor) -> None:
    with TensorStore(folder, "benchmark") as store:
        for key in keys:
            store.put(key, {"x": value})


def write_files(folder: Path, keys: list[str], value: Tensor) -> None:
    folder.mkdir()
    for key in keys:
        with (folder / f"{key}.pt").open("wb") as file:
            torch.save({"x": value}, file)
            file.flush()
            os.fsync(file.fileno())


def find_in_store(folder: Path, keys: list[str]) -> None:
    with TensorStore(folder, "benchmark") as store:
        assert not store.missing_keys(keys)


def find_files(folder: Path, keys: list[str]) -> None:
    for key in keys:
        (folder / f"{key}.pt").stat()


def measure(
    folder: Path, keys: list[str], order: list[str], value: Tensor, pairs: int
) -> dict[str, dict[str, dict[str, float]]]:
    ours, files = folder / "ours", folder / "files"

    def remove_both() -> None:
        shutil.rmtree(ours, ignore_errors=True)
        shutil.rmtree(files, ignore_errors=True)

    def read_file(key: str) -> object:
        return torch.load(files / f"{key}.pt", weights_only=True)

    writing = compare(
        lambda: write_store(ours, keys, value),
        lambda: write_files(files, keys, value),
        pairs,
        before=remove_both,
    )
    remove_both()
    write_store(ours, keys, value)
    write_files(files, keys, value)
    finding = compare(lambda: find_in_store(ours, keys), lambda: find_files(files, keys), pairs)
    with TensorStore(ours, "benchmark") as store, ThreadPoolExecutor(THREADS) as pool:
        reading = compare(
            lambda: [store.get(key) for key in order],
            lambda: [read_file(key) for key in order],
            pairs,
        )
        reading_in_threads = compare(
            lambda: list(pool.map(store.get, order)),
            lambda: list(pool.map(read_file, order)),
            pairs,
        )
    return {
        "write": writing.both(),
        "find": finding.both(),
        "read": reading.both(),
        f"read_{THREADS}_threads": reading_in_threads.both(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; default: a temporary folder"
    )
    add_pairs(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keys = [f"{number:064x}" for number in range(arguments.samples)]
    order = random.Random(0).sample(keys, len(keys))
    result: dict[str, object] = {"benchmark": "cache", "samples": len(keys)}
    for kind, make in KINDS.items():
        value = make()
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            times = measure(Path(name), keys, order, value, arguments.pairs)
        result[kind] = {"mib_per_sample": round(value.nbytes / 2**20, 3), **times}
    print(json.dumps({**result, **environment()}))


if __name__ == "__main__":
    main()
