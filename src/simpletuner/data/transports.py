"""Transfer of remote files: the requests of a server, and its failures.

A transport reads one kind of address: http_transport.py URLs, object_store.py buckets. It makes one
attempt; remote_store.py repeats it.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

ATTEMPTS = 5
Result = TypeVar("Result")


class TransferError(OSError):
    """A request that failed; strerror is a sentence part such as "HTTP 404 Not Found".

    permanent: the same request would fail again. retry_after_s: the wait that the server asked for.
    offline: no request was made, because the network is switched off.
    """

    def __init__(
        self,
        reason: str,
        *,
        permanent: bool,
        retry_after_s: float | None = None,
        offline: bool = False,
    ) -> None:
        super().__init__(errno.EREMOTEIO, reason)
        self.permanent, self.offline = permanent, offline
        self.retry_after_s = retry_after_s


def repeat_request(
    action: Callable[[], Result], before_repetition: Callable[[TransferError, int], None]
) -> Result:
    """Return the result of the action, which is repeated after failures that may pass.

    before_repetition: receives the failure and how many attempts there were, and waits. Raises the
    TransferError of the last attempt.
    """
    for number in range(1, ATTEMPTS):
        try:
            return action()
        except TransferError as error:
            if error.permanent or error.offline:
                raise
            failure = error
        before_repetition(failure, number)
    return action()


@dataclass
class PartialDownload:
    """A file that is being downloaded; an attempt continues where the last was cut.

    file: empty at first, open for writing. validator: text of the server that stands for the
    content, so that parts of two versions are never joined; "" means that every attempt starts
    again. expected_bytes: the size in the listing, None where it is unknown.
    """

    file: BinaryIO
    max_bytes: int
    expected_bytes: int | None = None
    validator: str = ""

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.validator = ""

    def append(self, block: bytes) -> None:
        """Write the next block. Raises TransferError when the file becomes too large."""
        if self.file.tell() + len(block) > self.max_bytes:
            raise too_large(self.max_bytes)
        self.file.write(block)


def too_large(max_bytes: int) -> TransferError:
    """Return the error for a file of more than `max_bytes`."""
    return TransferError(f"is larger than {max_bytes >> 20} MiB", permanent=True)


class Transport(ABC):
    """Single attempts of reading files of one kind of address. May be used from many threads."""

    @abstractmethod
    def download(self, location: str, partial: PartialDownload) -> None:
        """Write what is missing of the file. Raises TransferError."""

    @abstractmethod
    def read_range(self, location: str, start: int, length: int) -> bytes:
        """Return `length` bytes of the file. Raises TransferError, also when it is shorter."""

    @abstractmethod
    def file_size(self, location: str) -> int:
        """Return the length of the file in bytes. Raises TransferError."""
