"""What a person may look at or take out of a run folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from simpletuner.events.history import History
from simpletuner.server.place import Outside, Place
from simpletuner.server.tail import clean
from simpletuner.server.wire.runs import Checkpoint, Output, Picture

LORA = "pytorch_lora_weights.safetensors"
KEEP = "keep"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def pictures(history: History) -> list[Picture]:
    """Validation pictures, oldest step first."""
    found = sorted(history.pictures.values(), key=lambda one: one.step)
    return [Picture(**{name: vars(one)[name] for name in Picture.model_fields}) for one in found]


def stored(place: Place, folder: Path, name: str) -> Path:
    """A file below a run folder; of a checkpoint its LoRA file. Raises Outside, also where there is none."""
    path = place.below(folder, f"{name}/{LORA}" if CHECKPOINT.fullmatch(name) else name)
    if not os.path.isfile(path):
        raise Outside("there is no such file")
    return path


def checkpoints(folder: Path, best: int | None) -> list[Checkpoint]:
    """Complete ones, newest first. A file `keep` inside marks one: the training never removes it."""
    found = []
    for entry in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        if step_of(entry) < 0 or entry.is_symlink() or not entry.is_dir():
            continue
        try:
            sizes = {clean(file.name): file.lstat().st_size for file in entry.iterdir()}
            saved_t = (entry / "manifest.json").stat().st_mtime
        except OSError:
            continue  # being removed in this moment
        found.append(Checkpoint(
            name=entry.name, step=step_of(entry), size_bytes=sum(sizes.values()), saved_t=saved_t,
            marked=KEEP in sizes, best=step_of(entry) == best, files=sorted(sizes.keys() - {KEEP}),
        ))  # fmt: skip
    return found


def step_of(folder: Path) -> int:
    match = CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else -1


def outputs(folder: Path) -> list[Output]:
    """The weights that the training left."""
    files = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return [
        Output(path=clean(file.relative_to(folder).as_posix()), size_bytes=file.stat().st_size)
        for file in sorted(files)
        if file.is_file()
    ]


def mark(place: Place, folder: Path, name: str, marked: bool) -> None:
    """Raises Outside where there is no such checkpoint."""
    checkpoint = place.below(folder, name)
    if not CHECKPOINT.fullmatch(name) or not checkpoint.is_dir():
        raise Outside("there is no such checkpoint")
    if marked:
        (checkpoint / KEEP).touch()
    else:
        (checkpoint / KEEP).unlink(missing_ok=True)
