"""The processes that a process has started, from /proc.

Where there is no /proc, as on macOS, none is found; trainings on several GPUs run on Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

PROC = Path("/proc")
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def become_subreaper() -> None:
    """Make this process the parent of its descendants whose own parent ends, on Linux."""
    if PROC.is_dir():
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(roots: Iterable[int]) -> list[int]:
    """Return the running processes that the roots, and these in turn, have started."""
    children: dict[int, list[int]] = {}
    for pid, parent, _ in _running_processes():
        children.setdefault(parent, []).append(pid)
    members: list[int] = []
    pending = list(roots)
    while pending:
        started = children.pop(pending.pop(), [])
        members += started
        pending += started
    return members


def group_members(group: int) -> list[int]:
    """Return the running processes of a process group."""
    return [pid for pid, _, own_group in _running_processes() if own_group == group]


def kill(pids: Iterable[int]) -> None:
    """Send SIGKILL to each process that has not ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _running_processes() -> Iterator[tuple[int, int, int]]:
    """Yield (process, parent, process group), without processes that have ended."""
    names = os.listdir(PROC) if PROC.is_dir() else ()
    for name in filter(str.isdigit, names):
        with contextlib.suppress(OSError):  # it ended in the meantime
            # The name of the program is in parentheses and may contain spaces and parentheses.
            stat = (PROC / name / "stat").read_text(encoding="utf-8", errors="replace")
            state, parent, group = stat.rpartition(")")[2].split()[:3]
            if state not in "ZX":
                yield int(name), int(parent), int(group)
