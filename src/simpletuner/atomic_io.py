"""Atomic file writes: a file is complete or it does not change, even after a crash or power cut.

The content goes to a temporary file in the same folder, is synced to disk, and is then renamed over
the target. A rename within one file system is atomic.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` with `content`; readers see the old content or the new one.

    Several threads and processes may write the same path; the last rename wins. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Sync a file's content, or the renames inside a folder, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def os_error_of(error: Exception) -> OSError:
    """Return the OSError whose number is in the message, as the safetensors library writes it."""
    match = re.search(r"os error (\d+)", str(error))
    full = errno.ENOSPC if "No space left" in str(error) else errno.EIO
    number = int(match.group(1)) if match else full
    return OSError(number, os.strerror(number))
