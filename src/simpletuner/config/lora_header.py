"""The rank of a LoRA file, by its header: known before anything is loaded."""

from __future__ import annotations

import json
import struct
from operator import index
from pathlib import Path

LONGEST_HEADER = 8 << 20
DOWN = (".lora_A.weight", ".lora_down.weight")
FUSED = ("qkv", "linear1")  # block-diagonal ones have the ranks of their parts added up


def ranks(path: Path) -> tuple[int, int]:
    """The largest rank, and the largest that surely is one module's; zeros for what holds no pairs.

    What is no LoRA is told by those who read it whole.
    """
    path = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if not path.is_file():  # a pipe would be waited for
        return 0, 0
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= LONGEST_HEADER else {}
        found = {key: index(entry["shape"][0]) for key, entry in header.items() if key.endswith(DOWN)}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error):
        return 0, 0
    single = (rank for key, rank in found.items() if not key.split(".lora_")[0].endswith(FUSED))
    return max(found.values(), default=0), max(single, default=0)
