"""The same picture under several names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from simpletuner.data.types import Placed
from simpletuner.errors import DataError


def identical(paths: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Groups of files with equal content. Only files that share their length are read."""
    by_length: dict[int, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        by_length[path.stat().st_size].append(path)
    groups: list[tuple[Path, ...]] = []
    for same_length in by_length.values():
        if len(same_length) > 1:
            by_content: dict[bytes, list[Path]] = defaultdict(list)
            for path in same_length:
                by_content[hashlib.sha256(path.read_bytes()).digest()].append(path)
            groups += [tuple(same) for same in by_content.values() if len(same) > 1]
    return groups


def refuse_leaks(train: Sequence[Placed], held_out: Sequence[Placed]) -> None:
    """Raises DataError when a held-out picture is also trained on: its loss would measure memory."""
    trained = {placed.sample.path: placed.sample.id for placed in train}
    watched = {placed.sample.path: placed.sample.id for placed in held_out}
    leaks = [(watched[path], trained[path]) for path in watched.keys() & trained.keys()]
    for group in identical([*trained, *watched]):
        seen = [path for path in group if path in trained]
        held = [path for path in group if path in watched and path not in trained]
        leaks += [(watched[path], trained[seen[0]]) for path in held if seen]
    if leaks:
        lines = "\n".join(f"  {held} is {learned}" for held, learned in sorted(leaks)[:20])
        raise DataError(
            f"{len(leaks)} pictures of an eval set are also trained on, so its loss would say nothing; "
            f"move them out of one of the two sets:\n{lines}"
        )
