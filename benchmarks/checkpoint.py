"""Saving and loading a checkpoint of the size of Chroma's rank-16 LoRA, against torch.save.

    python -m benchmarks.checkpoint [--pairs 7]

26.1 M float32 parameters (`all`), two AdamW moments and an EMA of each. One JSON line: `save` is
our checkpoint, hashed and synced to the disk, against one torch.save of everything, neither hashed
nor synced; `load` is verifying the hashes and reading, against torch.load. CPU and wall seconds;
ratio is ours / theirs, the median of the pairs with its quartiles (benchmarks/paired.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from benchmarks.paired import add_pairs, compare, environment
from torch import Tensor

from simpletuner.training import checkpoint

MODULES, RANK, WIDTH = 266, 16, 3072


def make_tensors() -> dict[str, dict[str, Tensor]]:
    factors = {
        f"module_{index}.lora_{side}": torch.randn(RANK, WIDTH)
        for index in range(MODULES)
        for side in "AB"
    }
    moments = {
        f"{index}.{key}": tensor.clone()
        for index, tensor in enumerate(factors.values())
        for key in ("m", "v")
    }
    return {"weights": factors, "optimizer": moments, "ema": factors}


def save(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> Path:
    data = checkpoint.CheckpointData(1, tensors, {})
    return checkpoint.save_checkpoint(folder, data, None, keep=2)


def load(saved: Path) -> None:
    checkpoint.verify_checkpoint(saved)
    checkpoint.read_tensors(saved)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_pairs(parser)
    pairs = parser.parse_args().pairs
    tensors = make_tensors()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        plain = Path(name) / "all.pt"

        def remove_both() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            plain.unlink(missing_ok=True)

        saving = compare(
            lambda: save(folder, tensors),
            lambda: torch.save(tensors, plain),
            pairs,
            before=remove_both,
        )
        remove_both()
        saved = save(folder, tensors)
        torch.save(tensors, plain)
        loading = compare(lambda: load(saved), lambda: torch.load(plain, weights_only=True), pairs)
        size = sum(path.stat().st_size for path in saved.rglob("*"))
    record = {
        "benchmark": "checkpoint",
        "parameters": sum(tensor.numel() for tensor in tensors["weights"].values()),
        "bytes": size,
        "save": saving.both(),
        "load": loading.both(),
        **environment(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
