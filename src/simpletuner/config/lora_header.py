"""Adapter type and rank of a LoRA file, read from its header before anything is loaded."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 8 << 20
DOWN_WEIGHT_SUFFIXES = (".lora_A.weight", ".lora_down.weight")
FUSED_MODULE_SUFFIXES = (
    "qkv",
    "linear1",
)  # block-diagonal ones have the ranks of their parts added up


@dataclass(frozen=True)
class LoraRanks:
    """Ranks of the modules of a file; zeros for a file without low-rank pairs.

    largest_single: the largest rank that is surely one module's.
    """

    smallest: int = 0
    largest: int = 0
    largest_single: int = 0


def read_ranks(path: Path) -> LoraRanks:
    """Return the ranks in a file; reading the whole file later reports a damaged one."""
    try:
        ranks = {
            key: index(entry["shape"][0])
            for key, entry in _read_header(path).items()
            if key.endswith(DOWN_WEIGHT_SUFFIXES)
        }
    except (TypeError, LookupError):
        return LoraRanks()
    single = [
        rank
        for key, rank in ranks.items()
        if not key.split(".lora_")[0].endswith(FUSED_MODULE_SUFFIXES)
    ]
    if not ranks:
        return LoraRanks()
    return LoraRanks(min(ranks.values()), max(ranks.values()), max(single, default=0))


def detect_lycoris_algos(path: Path) -> frozenset[str]:
    """Return LyCORIS' names of the adapter types of a file; none for a LoRA.

    A file of apply_preset may hold LoKr and LoHa.
    """
    marks = {"lokr": ".lokr_w", "loha": ".hada_w"}
    keys = _read_header(path)
    return frozenset(name for name, mark in marks.items() if any(mark in key for key in keys))


def _read_header(path: Path) -> dict[str, Any]:
    path = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if not path.is_file():  # a pipe would be waited for
        return {}
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= MAX_HEADER_BYTES else {}
    except (OSError, ValueError, RecursionError, struct.error):
        return {}
    return header if isinstance(header, dict) else {}
