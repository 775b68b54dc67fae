"""The same picture under several names."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from simpletuner.data.report import printable
from simpletuner.data.types import Placed
from simpletuner.errors import DataError


def identical(paths: Iterable[Path]) -> list[list[Path]]:
    """Groups of files with equal content. A file that cannot be read (any more) is in none.

    Only files that share their length are opened.
    """
    groups = [list(dict.fromkeys(paths))]
    for mark in (os.path.getsize, _content):
        groups = [alike for group in groups for alike in _alike(group, mark)]
    return groups


def _alike(paths: Sequence[Path], mark: Callable[[Path], object]) -> list[list[Path]]:
    found: dict[object, list[Path]] = defaultdict(list)
    for path in paths:
        with contextlib.suppress(OSError):
            found[mark(path)].append(path)
    return [alike for alike in found.values() if len(alike) > 1]


def _content(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def refuse_leaks(
    train: Sequence[Placed], held_out: Sequence[Placed], copies: Sequence[Sequence[Path]]
) -> None:
    """Raises DataError when a held-out picture is also trained on: its loss would measure memory.

    copies: of `identical` over all of them.
    """
    trained = {placed.sample.path: placed.sample.id for placed in train}
    twins = {
        path: trained[one] for group in copies for path in group for one in reversed(group) if one in trained
    }
    learned = twins | trained
    leaks = [
        (placed.sample.id, learned[placed.sample.path])
        for placed in held_out
        if placed.sample.path in learned
    ]
    if leaks:
        lines = "\n".join(printable(f"  {held} is {learned_as}") for held, learned_as in sorted(leaks)[:20])
        raise DataError(
            f"{len(leaks)} pictures of an eval set are also trained on, so its loss would say nothing; "
            f"move them out of one of the two sets:\n{lines}"
        )
