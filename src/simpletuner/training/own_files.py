"""Files that a run writes into its folder, and what a person has made of them since.

The marker of the folder records the hash of each file that the run replaces. A file with another
content was edited, and is moved to earlier-N/ instead of being replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpletuner.atomic_io import write_atomically
from simpletuner.bounded_files import read_bounded_text
from simpletuner.config.output_folder import RUN_MARKER

MARKER_FORMAT = 1
# Names in a run folder that runs write. Everything else belongs to the user and stays.
OWN_PATTERNS = (
    "config.json",
    "events.jsonl",
    "train.log",
    "exit.json",
    "report.html",
    "README.md",
    "rejected.jsonl",
    "images",
    "tensorboard",
    "ema",
    "transformer",
    "transformer_ema",
    "transformer*_native.safetensors",
    "pytorch_lora_weights*.safetensors",
    "checkpoint-*",
    "damaged-checkpoint-*",
)
RESULT_PATTERNS = ("pytorch_lora_weights*.safetensors", "transformer", "transformer_ema", "ema")


def write_marker(run_dir: Path) -> None:
    """Write the marker unless it is there; it comes before every other file of a run."""
    if not (run_dir / RUN_MARKER).is_file():
        _write_record(run_dir, {})


def replace_own_file(run_dir: Path, name: str, content: str) -> Path | None:
    """Write a file of the run; return where an edited one was moved to, None if there was none."""
    data = content.encode("utf-8")
    moved = set_edited_aside(run_dir, name, data)
    write_atomically(run_dir / name, data)
    remember_own_file(run_dir, name)
    return moved


def set_edited_aside(run_dir: Path, name: str, replacement: bytes = b"") -> Path | None:
    """Move a file that differs from what the run wrote, and from its replacement, to earlier-N/."""
    path = run_dir / name
    if not path.is_file():
        return None
    digest = _hash(path.read_bytes())
    if digest in (_read_record(run_dir).get(name), _hash(replacement)):
        return None
    return move_to_earlier(run_dir, [path])


def remember_own_file(run_dir: Path, name: str) -> None:
    """Record the content of a file that the run has just written."""
    record = {**_read_record(run_dir), name: _hash((run_dir / name).read_bytes())}
    _write_record(run_dir, record)


def move_to_earlier(run_dir: Path, entries: Sequence[Path]) -> Path:
    """Move entries of the run folder into a new earlier-N/, and return it."""
    number = 1
    while (run_dir / f"earlier-{number}").exists():
        number += 1
    target = run_dir / f"earlier-{number}"
    target.mkdir()
    for entry in entries:
        destination = target / entry.relative_to(run_dir)
        destination.parent.mkdir(parents=True, exist_ok=True)
        # A rename within the folder costs nothing and cannot lose a file halfway.
        entry.rename(destination)
    return target


def list_own_entries(run_dir: Path) -> list[Path]:
    """Return what runs have written into the folder, without caches, lock and earlier results."""
    return sorted({path for pattern in OWN_PATTERNS for path in run_dir.glob(pattern)})


def list_results(run_dir: Path) -> list[Path]:
    """Return the final weights in the folder."""
    return sorted({path for pattern in RESULT_PATTERNS for path in run_dir.glob(pattern)})


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_record(run_dir: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        marker: Any = json.loads(read_bounded_text(run_dir / RUN_MARKER))
        written = marker.get("written") if isinstance(marker, dict) else None
        if isinstance(written, dict):
            return {str(name): str(value) for name, value in written.items()}
    return {}  # a damaged marker still marks; edited files are then moved, never lost


def _write_record(run_dir: Path, written: dict[str, str]) -> None:
    marker = {"format": MARKER_FORMAT, "program": "simpletuner", "written": written}
    write_atomically(run_dir / RUN_MARKER, json.dumps(marker, indent=1) + "\n")
