"""Removal of what a process that was killed had half written or half removed in a run folder.

Every writer works under a name that no reader looks for and renames at the end: checkpoints and
folders as `.writing-*`, files as `.NAME.*.tmp`. The caller must hold the run lock, so that no other
process is writing them.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

CHECKPOINT_LEFTOVERS = (".writing-checkpoint-*", ".removing-checkpoint-*")
FOLDER_LEFTOVERS = (*CHECKPOINT_LEFTOVERS, ".writing-*", ".replaced-*")
FILE_LEFTOVERS = (".*.tmp", "images/.*.tmp", "images/*/.*.tmp", "ema/.*.tmp")


def remove_checkpoint_leftovers(run_dir: Path) -> None:
    """Remove unfinished checkpoints; done before free space is measured for the next one."""
    _remove_folders(run_dir, CHECKPOINT_LEFTOVERS)


def remove_all_leftovers(run_dir: Path) -> None:
    """Remove all leftovers, when a process has just taken the run lock.

    A folder that was put aside for its successor, and has none, gets its name back. Whatever cannot
    be removed stays.
    """
    for old in run_dir.glob(".replaced-*"):
        target = old.with_name(old.name.removeprefix(".replaced-"))
        if not target.exists():
            with contextlib.suppress(OSError):
                old.rename(target)
    _remove_folders(run_dir, FOLDER_LEFTOVERS)
    for pattern in FILE_LEFTOVERS:
        for leftover in run_dir.glob(pattern):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _remove_folders(run_dir: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for leftover in run_dir.glob(pattern):
            if not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
