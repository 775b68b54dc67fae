"""Saving and verifying a checkpoint of the size of Chroma's rank-16 LoRA on `all`.

    python benchmarks/checkpoint.py

26.1 M float32 parameters, two AdamW moments and an EMA of each: one JSON line with bytes, seconds to save
(hash and sync included) and to verify and load, and the same for one torch.save of everything, unsynced and
unhashed, as the ratio.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

from simpletuner.training import checkpoint

MODULES, RANK, WIDTH = 266, 16, 3072


def main() -> None:
    factors = {
        f"module_{index}.lora_{side}": torch.randn(RANK, WIDTH) for index in range(MODULES) for side in "AB"
    }
    moments = {
        f"{index}.{key}": tensor.clone()
        for index, tensor in enumerate(factors.values())
        for key in ("m", "v")
    }
    tensors = {"weights": factors, "optimizer": moments, "ema": factors}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        saved = checkpoint.save_checkpoint(folder, checkpoint.CheckpointData(1, tensors, {}), None, keep=2)
        save_s = time.perf_counter() - started
        started = time.perf_counter()
        checkpoint.verify_checkpoint(saved)
        checkpoint.read_tensors(saved)
        load_s = time.perf_counter() - started
        size = sum(path.stat().st_size for path in saved.rglob("*"))
        started = time.perf_counter()
        torch.save(tensors, folder / "all.pt")
        plain_s = time.perf_counter() - started
    record = {
        "parameters": sum(tensor.numel() for tensor in factors.values()), "bytes": size,
        "save_s": round(save_s, 2), "verify_and_load_s": round(load_s, 2), "torch_save_s": round(plain_s, 2),
        "save_over_torch_save": round(save_s / plain_s, 2),
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    main()
