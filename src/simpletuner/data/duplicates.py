"""Identical images under several names."""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from simpletuner.data.file_facts import FileFacts
from simpletuner.data.rejections import make_printable
from simpletuner.data.sample_types import BucketedSample
from simpletuner.data.sources import SourceFile
from simpletuner.errors import DataError

MAX_LISTED_LEAKS = 20


def find_identical_files(
    files: Iterable[SourceFile], facts: Mapping[SourceFile, FileFacts] | None = None
) -> list[list[SourceFile]]:
    """Return groups of files with equal content. A file that cannot be read is in none.

    Only files that have the same length are opened. facts: of slow files; a slow file without facts
    was not read yet, and is in no group.
    """
    known = facts or {}

    def size(file: SourceFile) -> int:
        return known[file].size_bytes if file.is_slow else file.size_bytes()

    def content(file: SourceFile) -> str:
        return known[file].sha256 if file.is_slow else content_hash(file)

    # One file may be in several datasets; that is noticed apart and not a copy.
    groups = [[file for file in dict.fromkeys(files) if not file.is_slow or file in known]]
    for key_of in (size, content):
        groups = [equal for group in groups for equal in _group_by_key(group, key_of)]
    return groups


def _group_by_key(
    files: Sequence[SourceFile], key_of: Callable[[SourceFile], object]
) -> list[list[SourceFile]]:
    by_key: dict[object, list[SourceFile]] = defaultdict(list)
    for file in files:
        with contextlib.suppress(OSError):
            by_key[key_of(file)].append(file)
    return [equal for equal in by_key.values() if len(equal) > 1]


def content_hash(file: SourceFile) -> str:
    """Return the SHA-256 of a file in hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with file.open() as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_no_leaks(
    train: Sequence[BucketedSample],
    held_out: Sequence[BucketedSample],
    copies: Sequence[Sequence[SourceFile]],
) -> None:
    """Raise DataError if a held-out image is also trained on: its loss would be meaningless.

    copies: the result of `find_identical_files` for all of them.
    """
    trained = {item.sample.file: item.sample.id for item in train}
    for group in copies:
        trained_copy = next((trained[file] for file in group if file in trained), None)
        if trained_copy is not None:
            # A copy under another name counts as the trained image itself.
            trained = {**dict.fromkeys(group, trained_copy), **trained}
    leaks = sorted(
        (item.sample.id, trained[item.sample.file])
        for item in held_out
        if item.sample.file in trained
    )
    if leaks:
        lines = "\n".join(
            make_printable(f"  {held_id} is {trained_id}")
            for held_id, trained_id in leaks[:MAX_LISTED_LEAKS]
        )
        count = "1 image" if len(leaks) == 1 else f"{len(leaks)} images"
        raise DataError(
            f"{count} of an eval dataset {'is' if len(leaks) == 1 else 'are'} also trained on, "
            "which makes the held-out loss meaningless; remove from one of the two "
            f"datasets:\n{lines}"
        )
