"""What a person may look at or take out of a run folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from simpletuner.events.run_history import RunHistory
from simpletuner.server.log_reader import replace_surrogates
from simpletuner.server.schemas.runs import CheckpointInfo, OutputFile, RunImage
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace

LORA_FILE = "pytorch_lora_weights.safetensors"
KEEP_MARKER = "keep"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def list_images(history: RunHistory) -> list[RunImage]:
    """Validation pictures, oldest step first."""
    found = sorted(history.images.values(), key=lambda one: one.step)
    return [RunImage(**{name: vars(one)[name] for name in RunImage.model_fields}) for one in found]


def resolve_artifact(place: Workspace, folder: Path, name: str) -> Path:
    """A file below a run folder; of a checkpoint its LoRA file. Raises Outside, also where there is none."""
    path = place.resolve_below(
        folder, f"{name}/{LORA_FILE}" if CHECKPOINT_NAME.fullmatch(name) else name
    )
    if not os.path.isfile(path):
        raise PathOutsideWorkspace("there is no such file")
    return path


def list_checkpoints(folder: Path, best: int | None) -> list[CheckpointInfo]:
    """Complete ones, newest first. A file `keep` inside marks one: the training never removes it."""
    found = []
    for entry in sorted(folder.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        if checkpoint_step(entry) < 0 or entry.is_symlink() or not entry.is_dir():
            continue
        try:
            sizes = {
                replace_surrogates(file.name): file.lstat().st_size for file in entry.iterdir()
            }
            saved_t = (entry / "manifest.json").stat().st_mtime
        except OSError:
            continue  # being removed in this moment
        found.append(
            CheckpointInfo(
                name=entry.name,
                step=checkpoint_step(entry),
                size_bytes=sum(sizes.values()),
                saved_t=saved_t,
                marked=KEEP_MARKER in sizes,
                best=checkpoint_step(entry) == best,
                files=sorted(sizes.keys() - {KEEP_MARKER}),
            )
        )
    return found


def checkpoint_step(folder: Path) -> int:
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def list_outputs(folder: Path) -> list[OutputFile]:
    """The weights that the training left."""
    files = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return [
        OutputFile(
            path=replace_surrogates(file.relative_to(folder).as_posix()),
            size_bytes=file.stat().st_size,
        )
        for file in sorted(files)
        if file.is_file()
    ]


def mark_checkpoint(place: Workspace, folder: Path, name: str, marked: bool) -> None:
    """Raises Outside where there is no such checkpoint."""
    checkpoint = place.resolve_below(folder, name)
    if not CHECKPOINT_NAME.fullmatch(name) or not checkpoint.is_dir():
        raise PathOutsideWorkspace("there is no such checkpoint")
    if marked:
        (checkpoint / KEEP_MARKER).touch()
    else:
        (checkpoint / KEEP_MARKER).unlink(missing_ok=True)
