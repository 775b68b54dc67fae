"""Fingerprints of weight files, computed in milliseconds from a sample of their bytes."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from simpletuner.bounded_files import open_regular_file

SAMPLE_BYTES = 64 * 1024
SAMPLE_COUNT = 32


def fingerprint_file(path: Path) -> str:
    """Fingerprint a file in milliseconds by its size and 33 evenly spread blocks of 64 KiB.

    The first block is the start of the file. Small files are hashed completely. A large file that
    changed only between the sampled blocks would not be noticed; retrained or requantized weights
    change everywhere.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name}:{size}".encode())
    with open_regular_file(path) as file:
        if size <= SAMPLE_BYTES * (SAMPLE_COUNT + 1):
            digest.update(file.read())
        else:
            for block in range(SAMPLE_COUNT + 1):
                file.seek(block * (size - SAMPLE_BYTES) // SAMPLE_COUNT)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def combined_fingerprint(*parts: str | Path) -> str:
    """Combine strings and files into one short hash; a file counts by name and content."""
    texts = [fingerprint_file(part) if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:32]


def major_version(package: str) -> str:
    """Return the name and the major version of an installed package."""
    return f"{package} {version(package).split('.')[0]}"
