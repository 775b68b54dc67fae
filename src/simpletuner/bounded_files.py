"""Reading of files that other people wrote: regular files only, and of a bounded size.

A named pipe would be waited for, and a device such as /dev/zero never ends; both can have any name.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MIB = 1 << 20
CONFIG_FILE_MIB = 16  # the resolved configuration of a run has 0.01 MiB


def open_regular_file(path: Path | str) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for every other kind of file."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    # Without O_NONBLOCK a pipe that has replaced the file in this moment would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return file


def read_bounded_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file. Raises OSError (EFBIG) when it is larger."""
    with open_regular_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        limit = f"{max_bytes / MIB:g} MiB" if max_bytes >= MIB else f"{max_bytes} bytes"
        raise OSError(errno.EFBIG, f"is larger than {limit}", str(path))
    return content


def read_bounded_text(path: Path, max_bytes: int = CONFIG_FILE_MIB * MIB) -> str:
    """Return the UTF-8 text of a regular file.

    Raises OSError, and UnicodeDecodeError (a ValueError) for other bytes.
    """
    return read_bounded_bytes(path, max_bytes).decode("utf-8")
