"""Checkpoints on disk, safe against crashes and power cuts, verified before they are used.

How a checkpoint is written, and why no moment can leave a broken one behind:

1. All files are written to `.writing-checkpoint-N-PID`, a name that no reader looks for. A process
   that is killed here leaves a folder that the next save removes.
2. Every file is synced to the disk (fsync) and hashed; then manifest.json with the lengths and
   hashes is written and synced, last. A folder without it was never finished.
3. One rename makes the folder `checkpoint-N`, and the run folder is synced. A rename is atomic, so
   a reader sees all of the checkpoint or none of it.
4. Only now are checkpoints beyond the limit deleted: renamed to `.removing-...` first, so that a
   half-deleted folder is never read as a checkpoint. At every moment one complete checkpoint
   exists.

A checkpoint is used only if every file has the length and hash of the manifest. A damaged one is
renamed to `damaged-...`, never deleted, and the one before it is used.

checkpoint-500/
  manifest.json             length and SHA-256 of every other file; written last
  state.json                step, config, identity of base and dataset, scalars of the optimizer
  weights.safetensors       trained tensors, exactly as they are in memory
  optimizer.safetensors     tensors of the optimizer state
  ema.safetensors           if there is an EMA
  pytorch_lora_weights.safetensors   for a LoRA: the file other programs load
  keep                      a file that a user creates: this checkpoint is never removed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError
from torch import Tensor

from simpletuner.atomic_io import fsync_path, os_error_of
from simpletuner.bounded_files import open_regular_file, read_bounded_text
from simpletuner.errors import CheckpointError, DiskFull, storage_error
from simpletuner.events.event_types import CheckpointSetAside, Emit
from simpletuner.models.weights.tensor_files import (
    FileTensors,
    StoredSlice,
    iter_stored,
    write_tensors,
)
from simpletuner.training.leftovers import remove_checkpoint_leftovers
from simpletuner.training.own_files import move_to_earlier

PickTensor = Callable[[str, StoredSlice], Tensor | None]  # takes file stem and stored tensor

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)$")
FORMAT_VERSION = 1
MAX_STATE_BYTES = 256 << 20
REQUIRED_FILES = {"state.json", "weights.safetensors"}


@dataclass(frozen=True)
class CheckpointData:
    """All state of a run. tensors: file stem -> name -> tensor. state: for JSON."""

    step: int
    tensors: Mapping[str, FileTensors]
    state: Mapping[str, object]


def checkpoint_step(folder: Path) -> int:
    """Return the step in the name of a checkpoint folder; -1 for another name."""
    match = CHECKPOINT_NAME.search(folder.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints, newest first. A folder that is being written has another name."""
    if not run_dir.is_dir():
        return []
    folders = [
        folder
        for folder in run_dir.iterdir()
        if CHECKPOINT_NAME.fullmatch(folder.name) and folder.is_dir()
    ]
    return sorted(folders, key=checkpoint_step, reverse=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular_file(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    try:
        fsync_path(path)
    except OSError as error:
        if path.is_file():  # some file systems cannot sync a folder, but all can sync a file
            raise storage_error(f"{path} cannot be written to the disk", error) from error


def free_disk_bytes(folder: Path) -> int:
    """Return the free space of the disk that the folder is on."""
    return shutil.disk_usage(folder).free


def find_damage(folder: Path) -> str | None:
    """Describe the damage of a checkpoint; None when every file is as in the manifest.

    Never raises: a file that cannot be read is damage too.
    """
    try:
        expected_files = read_manifest(folder)
        for name, (size, digest) in expected_files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _sha256(path) != digest:
                return f"{name} does not have the content that was saved (its SHA-256 differs)"
    except ValueError as error:  # among them are invalid JSON, invalid UTF-8 and a NUL in a name
        return f"manifest.json is unreadable ({error})"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return file name -> (bytes, SHA-256) of a checkpoint. Raises OSError and ValueError."""
    try:
        manifest = json.loads(read_bounded_text(folder / "manifest.json"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files.keys() >= REQUIRED_FILES:
        raise ValueError(f"it does not list {' and '.join(sorted(REQUIRED_FILES))}")
    entries = {}
    for name, fields in files.items():
        size = fields.get("bytes") if isinstance(fields, dict) else None
        digest = fields.get("sha256") if isinstance(fields, dict) else None
        if type(size) is not int or not isinstance(digest, str):
            raise ValueError(f"its entry of {name!r} has no length or no hash")
        if not is_inside(name):
            raise ValueError(f"{name!r} is not the name of a file in the checkpoint")
        entries[name] = (size, digest)
    return entries


def is_inside(name: str) -> bool:
    """Return whether a relative POSIX path stays inside its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def is_saved(run_dir: Path, step: int) -> bool:
    """Return whether the run folder has an undamaged checkpoint of the step."""
    target = run_dir / f"checkpoint-{step}"
    return target.exists() and find_damage(target) is None


def save_checkpoint(
    run_dir: Path,
    snapshot: CheckpointData,
    extra: Callable[[Path], None] | None,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write checkpoint-<step>, and after that delete the oldest beyond `keep`; return its folder.

    extra: writes further files (the LoRA for other programs) into the folder that it gets. best:
    the step of a checkpoint that is not deleted; one with a `keep` file is not deleted either.

    Raises DiskFull when writing fails, or before it when there is less free space than 1.2 times
    the size of the tensors.
    """
    target = run_dir / f"checkpoint-{snapshot.step}"
    # A resumed run repeats the callbacks of its step.
    if is_saved(run_dir, snapshot.step):
        return target
    remove_checkpoint_leftovers(run_dir)
    needed = sum(tensor.nbytes for group in snapshot.tensors.values() for tensor in group.values())
    if free_disk_bytes(run_dir) < 1.2 * needed + (1 << 20):
        raise DiskFull(
            f"checkpoint-{snapshot.step} needs {needed / 1e9:.2f} GB and {run_dir} has "
            f"{free_disk_bytes(run_dir) / 1e9:.2f} GB free; earlier checkpoints are not affected. "
            "Free some space and run the same command to resume"
        )
    work = run_dir / f".writing-checkpoint-{snapshot.step}-{os.getpid()}"
    work.mkdir()
    try:
        _write(work, snapshot, extra)
        if target.exists():
            set_aside_damaged(target)
        os.replace(work, target)
    except (OSError, SafetensorError) as error:  # safetensors raises the latter for a full disk
        shutil.rmtree(work, ignore_errors=True)
        failure = error if isinstance(error, OSError) else os_error_of(error)
        problem = f"{target} cannot be written; earlier checkpoints are not affected"
        raise storage_error(problem, failure) from error
    _sync(run_dir)
    for old in list_checkpoints(run_dir)[keep:]:
        if old != target and checkpoint_step(old) != best and not (old / "keep").exists():
            remove_checkpoint(old)
    return target


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; of a symbolic link only the link, which leads outside the run folder.

    Files that a person has put into it, such as notes, are moved to earlier-N/.
    What cannot be deleted is left behind under a name that no reader looks for.
    """
    if folder.is_symlink():
        with contextlib.suppress(OSError):
            folder.unlink()
        return
    try:
        known = {*read_manifest(folder), "manifest.json"}
        notes = [
            path
            for path in folder.rglob("*")
            if path.is_file() and path.relative_to(folder).as_posix() not in known
        ]
        if notes:
            move_to_earlier(folder.parent, notes)
        removing = folder.rename(folder.with_name(f".removing-{folder.name}"))
    except (OSError, ValueError):
        return  # it stays, also a damaged one, whose manifest does not separate notes from state
    shutil.rmtree(removing, ignore_errors=True)


def _write(work: Path, snapshot: CheckpointData, extra: Callable[[Path], None] | None) -> None:
    for stem, tensors in snapshot.tensors.items():
        write_tensors(work / f"{stem}.safetensors", tensors)
    state = json.dumps(
        {"format": FORMAT_VERSION, "step": snapshot.step, **snapshot.state}, ensure_ascii=False
    )
    (work / "state.json").write_text(state, encoding="utf-8")
    if extra is not None:
        extra(work)
    files = {}
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        _sync(path)
        name = path.relative_to(work).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (work / "manifest.json").write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    _sync(work / "manifest.json")
    _sync(work)


def set_aside_damaged(folder: Path) -> Path:
    """Rename a damaged checkpoint to damaged-<name> (or with -N), and return the new path."""
    number = 0
    while (
        aside := folder.with_name(f"damaged-{folder.name}{f'-{number}' if number else ''}")
    ).exists():
        number += 1
    folder.rename(aside)
    return aside


def find_latest_valid(run_dir: Path, emit: Emit) -> Path | None:
    """Return the newest undamaged checkpoint; None if there is none.

    Newer ones that are damaged are renamed with an event, never deleted.
    """
    for folder in list_checkpoints(run_dir):
        reason = find_damage(folder)
        if reason is None:
            return folder
        emit(CheckpointSetAside(str(set_aside_damaged(folder)), reason))
    return None


def verify_checkpoint(folder: Path) -> None:
    """Raise CheckpointError if the folder is damaged or is not a checkpoint."""
    if not (folder / "manifest.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no manifest.json")
    if (reason := find_damage(folder)) is not None:
        raise CheckpointError(f"{folder} is damaged: {reason}")


def read_state(folder: Path) -> dict[str, object]:
    """Return state.json of a verified checkpoint; CheckpointError when its format is unknown."""
    try:
        state: dict[str, object] = json.loads(
            read_bounded_text(folder / "state.json", MAX_STATE_BYTES)
        )
        known = state.keys() >= {"format", "step"}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: state.json cannot be read ({error})") from error
    if not known or state["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format {state.get('format')}; this version reads format {FORMAT_VERSION}"
        )
    return state


def read_tensors(
    folder: Path, pick: PickTensor = lambda stem, stored: stored.read()
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a verified checkpoint: file stem -> name -> tensor.

    pick: returns what this process needs of a stored tensor; None leaves it out.
    """
    picked: dict[str, dict[str, Tensor]] = {}
    for stem in ("weights", "optimizer", "ema"):
        path = folder / f"{stem}.safetensors"
        if path.is_file():
            parts = ((stored.name, pick(stem, stored)) for stored in iter_stored(path))
            picked[stem] = {name: part for name, part in parts if part is not None}
    return picked


def flatten_optimizer(
    state_dict: Mapping[str, object],
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Split the state_dict of an optimizer into tensors by "index.key", and the rest for JSON."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, object]] = {}
    per_parameter: Mapping[int, Mapping[str, object]] = state_dict["state"]  # type: ignore[assignment]
    for index, values in per_parameter.items():
        scalars[str(index)] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                scalars[str(index)][key] = value
    groups: list[Mapping[str, object]] = state_dict["param_groups"]  # type: ignore[assignment]
    rest: list[dict[str, object]] = []
    for number, group in enumerate(groups):
        rest.append({key: value for key, value in group.items() if not isinstance(value, Tensor)})
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"group{number}.{key}"] = value
    return tensors, {"state": scalars, "param_groups": rest}


def unflatten_optimizer(
    tensors: Mapping[str, Tensor], rest: Mapping[str, object], fresh: Mapping[str, object]
) -> dict[str, object]:
    """Rebuild the state_dict that flatten_optimizer split.

    fresh: the state_dict of a new optimizer. JSON has no tuples, so a list becomes a tuple where
    the new optimizer has one.
    """
    state: dict[int, dict[str, object]] = {}
    scalars: Mapping[str, Mapping[str, object]] = rest["state"]  # type: ignore[assignment]
    for index, values in scalars.items():
        state[int(index)] = dict(values)
    groups = [dict(group) for group in rest["param_groups"]]  # type: ignore[attr-defined]
    for name, tensor in tensors.items():
        owner, key = name.split(".", 1)
        if owner.startswith("group"):
            groups[int(owner.removeprefix("group"))][key] = tensor
        else:
            state.setdefault(int(owner), {})[key] = tensor
    # torch compares betas as a tuple, and JSON gave a list.
    for group, template in zip(groups, fresh["param_groups"]):  # type: ignore[call-overload]
        for key, value in template.items():
            if isinstance(value, tuple) and isinstance(group.get(key), list):
                group[key] = tuple(group[key])
    return {"state": state, "param_groups": groups}
