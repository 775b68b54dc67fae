"""The folder that a run may own: its own earlier one, or one that holds nothing of the user's.

A run overwrites and deletes files of fixed names in its folder, so the folder must belong to it. A
marker, written before anything else, says so; a folder of a run from before there was a marker is
recognized by its event log or by a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from simpletuner.bounded_files import open_regular_file, read_bounded_text

RUN_MARKER = ".simpletuner-run.json"
CHECKPOINT_FOLDER = re.compile(r"checkpoint-\d+")
IGNORED_ENTRIES = ("lost+found",)  # and hidden ones
MAX_LISTED_ENTRIES = 5
OWN_CACHE_FOLDER = "cache"


def is_run_folder(folder: Path) -> bool:
    """Return whether a run of this program has written the folder. Never raises."""
    try:
        return (
            (folder / RUN_MARKER).is_file()
            or _starts_with_event(folder / "events.jsonl")
            or _has_empty_log_and_lock(folder)
            or any(
                _is_manifest(entry / "manifest.json")
                for entry in folder.iterdir()
                if CHECKPOINT_FOLDER.fullmatch(entry.name)
            )
        )
    except OSError:
        return False


def _starts_with_event(path: Path) -> bool:
    try:
        with open_regular_file(path) as file:
            first = json.loads(file.readline(1 << 20))
        return isinstance(first, dict) and first.keys() >= {"t", "kind"}
    except (OSError, ValueError, RecursionError):
        return False


def _has_empty_log_and_lock(folder: Path) -> bool:
    """Return whether an older run was killed here before its first event."""
    log, lock = folder / "events.jsonl", folder / "run.lock"
    return lock.is_file() and log.is_file() and log.stat().st_size == 0


def _is_manifest(path: Path) -> bool:
    try:
        files = json.loads(read_bounded_text(path))["files"]
        return "state.json" in files
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def foreign_entries(folder: Path) -> list[str]:
    """Return what a folder that is not a run's holds, sorted; [] for a run's or an empty one.

    Hidden files and lost+found do not count. Raises OSError if the folder cannot be listed.
    """
    if not folder.is_dir() or is_run_folder(folder):
        return []
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and entry.name not in IGNORED_ENTRIES
    )


def describe_foreign_folder(folder: Path, entries: Sequence[str]) -> str:
    """Return the refusal of a folder that holds other files, with the ways out."""
    listed = ", ".join(ascii(name)[1:-1] for name in entries[:MAX_LISTED_ENTRIES])
    if len(entries) > MAX_LISTED_ENTRIES:
        listed += f" and {len(entries) - MAX_LISTED_ENTRIES} more"
    number = 1
    while os.path.lexists(offered := folder / ("run" if number == 1 else f"run-{number}")):
        number += 1
    return (
        f"output_dir = {folder} holds files that no run has written ({listed}). A run needs a "
        f"folder of its own, because it replaces files there; nothing was changed. Choose another "
        f"output_dir, for example {offered}"
    )


def find_output_dir_problems(
    output_dir: Path,
    datasets: Mapping[str, Path],
    config_path: Path | None = None,
    caches: Sequence[Path] = (),
) -> Iterator[str]:
    """Yield why a run may not use the folder, one sentence each.

    datasets: id -> folder. config_path: the configuration file that was read. caches: cache folders
    that options name, which other runs may share.
    """
    own = _real(output_dir)
    for name, folder in datasets.items():
        data = _real(folder)
        if own == data or own in data.parents:
            yield (
                f"output_dir = {output_dir} contains the images of the dataset {name} ({folder}); "
                "choose another folder"
            )
        elif data in own.parents:
            yield (
                f"output_dir = {output_dir} is inside the dataset {name} ({folder}), so that "
                "images of the run would be trained on; choose another folder"
            )
    for cache in caches:
        if own == _real(cache) or (
            own in _real(cache).parents and _real(cache) != own / OWN_CACHE_FOLDER
        ):
            yield (
                f"output_dir = {output_dir} contains the cache folder {cache}, which other runs "
                "may share; choose another folder"
            )
    if config_path is not None and not is_run_folder(output_dir):
        parent = _real(config_path).parent
        if own == parent or own in parent.parents:
            yield (
                f"output_dir = {output_dir} contains the configuration {config_path}; choose a "
                f"folder next to it, for example {output_dir / 'run'}"
            )
            return
    try:
        entries = foreign_entries(output_dir)
    except OSError as error:
        yield f"output_dir = {output_dir} cannot be read: {error.strerror}"
        return
    if entries:
        yield describe_foreign_folder(output_dir, entries)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
