"""The same picture under several names."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from simpletuner.data.rejections import make_printable
from simpletuner.data.sample_types import BucketedSample
from simpletuner.errors import DataError


def find_identical_files(paths: Iterable[Path]) -> list[list[Path]]:
    """Groups of files with equal content. A file that cannot be read (any more) is in none.

    Only files that share their length are opened.
    """
    groups = [list(dict.fromkeys(paths))]
    for mark in (os.path.getsize, _content_hash):
        groups = [alike for group in groups for alike in _group_by_key(group, mark)]
    return groups


def _group_by_key(paths: Sequence[Path], mark: Callable[[Path], object]) -> list[list[Path]]:
    found: dict[object, list[Path]] = defaultdict(list)
    for path in paths:
        with contextlib.suppress(OSError):
            found[mark(path)].append(path)
    return [alike for alike in found.values() if len(alike) > 1]


def _content_hash(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def check_no_leaks(
    train: Sequence[BucketedSample],
    held_out: Sequence[BucketedSample],
    copies: Sequence[Sequence[Path]],
) -> None:
    """Raises DataError when a held-out picture is also trained on: its loss would measure memory.

    copies: of `identical` over all of them.
    """
    trained = {placed.sample.path: placed.sample.id for placed in train}
    twins = {
        path: trained[one]
        for group in copies
        for path in group
        for one in reversed(group)
        if one in trained
    }
    learned = twins | trained
    leaks = [
        (placed.sample.id, learned[placed.sample.path])
        for placed in held_out
        if placed.sample.path in learned
    ]
    if leaks:
        lines = "\n".join(
            make_printable(f"  {held} is {learned_as}") for held, learned_as in sorted(leaks)[:20]
        )
        raise DataError(
            f"{len(leaks)} pictures of an eval set are also trained on, so its loss would say "
            f"nothing; move them out of one of the two sets:\n{lines}"
        )
