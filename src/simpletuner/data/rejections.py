"""Files that are not trained on: their messages, and the list of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from simpletuner.atomic_io import write_atomically
from simpletuner.data.sample_types import RejectedFile
from simpletuner.errors import DataError

MAX_LISTED_FILES = 20
# Rejected as the options require; every other reason counts as a bad sample.
FILTER_REASONS = frozenset({"aspect_ratio", "too_small", "caption_dropped", "excluded"})


class UnusableFile(DataError):
    """One file cannot be used. reason: the short code of RejectedFile; the text is its detail."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def make_printable(text: str) -> str:
    """Return the text on one line and without control characters; file names may hold both."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def format_rejected(rejected: Sequence[RejectedFile], path: Path | None) -> str:
    """Return the first MAX_LISTED_FILES files, one per line, and where the complete list is."""
    lines = [
        make_printable(f"  {item.dataset}/{item.path}: {item.detail}")
        for item in rejected[:MAX_LISTED_FILES]
    ]
    if len(rejected) > MAX_LISTED_FILES:
        lines.append(f"  and {len(rejected) - MAX_LISTED_FILES} more")
    if path is not None:
        lines.append(f"Complete list: {path}")
    return "\n".join(lines)


def check_rejected_fraction(
    rejected: Sequence[RejectedFile],
    usable: int,
    max_bad_sample_fraction: float,
    path: Path | None = None,
) -> None:
    """Raise DataError when more than the allowed fraction of the files is unusable.

    Images outside the limits that the user set (FILTER_REASONS) do not count. path: of the list,
    for the message.
    """
    bad = [item for item in rejected if item.reason not in FILTER_REASONS]
    if len(bad) <= max_bad_sample_fraction * (usable + len(bad)):
        return
    reasons = ", ".join(
        f"{count} {reason}" for reason, count in Counter(item.reason for item in bad).most_common()
    )
    raise DataError(
        f"{len(bad)} of {usable + len(bad)} images cannot be used ({reasons}); "
        f"max_bad_sample_fraction allows {max_bad_sample_fraction:g}.\n{format_rejected(bad, path)}"
    )


def write_rejected(path: Path, rejected: Sequence[RejectedFile]) -> None:
    """Write one JSON object per line: path (inside the dataset), dataset, reason, detail.

    An existing file is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(asdict(item)) + "\n" for item in rejected))
