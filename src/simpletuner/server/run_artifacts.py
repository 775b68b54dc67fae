"""The files of a run folder that the API exposes: validation images, checkpoints, weights."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from simpletuner.events.run_history import RunHistory
from simpletuner.server.file_reader import replace_surrogates
from simpletuner.server.schemas.runs import CheckpointInfo, OutputFile, RunImage
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace

LORA_FILE = "pytorch_lora_weights.safetensors"
DOCUMENT_NAMES = ("report.html", "before_after.png", "README.md")
KEEP_MARKER = "keep"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def list_images(history: RunHistory) -> list[RunImage]:
    """Return the validation images, oldest step first."""
    images = sorted(history.images.values(), key=lambda image: image.step)
    return [
        RunImage(**{name: vars(image)[name] for name in RunImage.model_fields}) for image in images
    ]


def resolve_artifact(workspace: Workspace, folder: Path, name: str) -> Path:
    """Return the path of a file below a run folder; the name of a checkpoint means its LoRA file.

    Raises PathOutsideWorkspace, also if the file does not exist.
    """
    path = workspace.resolve_below(
        folder, f"{name}/{LORA_FILE}" if CHECKPOINT_NAME.fullmatch(name) else name
    )
    if not os.path.isfile(path):
        raise PathOutsideWorkspace("there is no such file")
    return path


def list_checkpoints(folder: Path, best: int | None) -> list[CheckpointInfo]:
    """Return the complete checkpoints, newest first.

    A file `keep` in a checkpoint marks it: the training never deletes it. best: the step with the
    lowest held-out loss.
    """
    checkpoints = []
    for entry in sorted(folder.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        if checkpoint_step(entry) < 0 or entry.is_symlink() or not entry.is_dir():
            continue
        try:
            sizes = {
                replace_surrogates(file.name): file.lstat().st_size for file in entry.iterdir()
            }
            saved_t = (entry / "manifest.json").stat().st_mtime
        except OSError:
            continue  # it is being deleted right now
        checkpoints.append(
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
    return checkpoints


def checkpoint_step(folder: Path) -> int:
    """Return the step in a checkpoint's name, -1 for another name."""
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def list_outputs(folder: Path, history: RunHistory | None = None) -> list[OutputFile]:
    """Return the weight files that the training wrote, the one for most programs first."""
    saved = {} if history is None else history.saved_weights
    files = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return [
        OutputFile(
            path=replace_surrogates(file.relative_to(folder).as_posix()),
            size_bytes=file.stat().st_size,
            programs=saved[name].programs if (name := _name_in(folder, file)) in saved else "",
        )
        for file in sorted(files, key=lambda file: (file.name != LORA_FILE, file))
        if file.is_file()
    ]


def list_documents(folder: Path) -> list[OutputFile]:
    """Return the report, the contact sheet and the model card, as far as they exist."""
    documents = []
    for name in DOCUMENT_NAMES:
        with contextlib.suppress(OSError):
            documents.append(
                OutputFile(path=name, size_bytes=(folder / name).stat().st_size, programs="")
            )
    return documents


def _name_in(folder: Path, file: Path) -> str:
    """Return the name by which the training saved a file: a transformer is a folder."""
    name = file.relative_to(folder).as_posix()
    return "transformer" if name.startswith("transformer/") else name


def mark_checkpoint(workspace: Workspace, folder: Path, name: str, marked: bool) -> None:
    """Mark or unmark a checkpoint. Raises PathOutsideWorkspace if it does not exist."""
    checkpoint = workspace.resolve_below(folder, name)
    if not CHECKPOINT_NAME.fullmatch(name) or not checkpoint.is_dir():
        raise PathOutsideWorkspace("there is no such checkpoint")
    if marked:
        (checkpoint / KEEP_MARKER).touch()
    else:
        (checkpoint / KEEP_MARKER).unlink(missing_ok=True)
