"""Failures that a user can fix, each with the exit code of the process.

SimpleTunerError            1   root of the tree; its text is the whole message, without traceback
├── ConfigError             2   invalid options or files named by options; lists every problem
├── DataError               3   images and captions
├── TrainingDiverged        4   the loss or the gradient is not a finite number
├── DiskFull                5   not enough disk space
├── DownloadError           6   no network, unknown or gated repository
├── RunLocked               7   another process is using this run folder
├── ModelError              8   weights that are missing, damaged or of another model
├── CheckpointError         9   no checkpoint to resume from, or it does not fit this configuration
├── CacheError             10   a cache that cannot be used and cannot be rebuilt
├── MissingExtra           11   an optional package is not installed
├── StorageError           12   the file system failed: read-only, I/O error, a file vanished
├── ProcessLost            13   another process of the run ended without a reason
└── TrainingStopped        75   stopped on request after saving a checkpoint; the command resumes
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

MAX_LISTED_PROBLEMS = 50


@dataclass(frozen=True)
class Problem:
    """One problem of a configuration, ready to print.

    location: "config.json:7:3", "--learning_rate" or "SIMPLETUNER_SEED"; empty if the problem
    concerns the configuration as a whole. message: one sentence with the value that was read, the
    values that are allowed and how to fix it.
    """

    location: str
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}" if self.location else self.message


class SimpleTunerError(Exception):
    """A failure that is explained in one sentence; the process ends with `exit_code`."""

    exit_code = 1

    def __init_subclass__(cls, code: int | None = None) -> None:
        cls.exit_code = cls.exit_code if code is None else code


class ConfigError(SimpleTunerError, code=2):
    """All problems of a configuration together."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        self.problems = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        lines = [str(problem) for problem in self.problems[:MAX_LISTED_PROBLEMS]]
        if len(self.problems) > MAX_LISTED_PROBLEMS:
            lines.append(f"and {len(self.problems) - MAX_LISTED_PROBLEMS} more")
        super().__init__("\n".join(lines))


class DataError(SimpleTunerError, code=3):
    """Images or captions that cannot be trained on."""


class TrainingDiverged(SimpleTunerError, code=4):
    """The loss or the gradient stopped being a finite number."""


class DiskFull(SimpleTunerError, code=5):
    """Not enough disk space for a file that is about to be written."""


class DownloadError(SimpleTunerError, code=6):
    """Weights that could not be downloaded."""


class RunLocked(SimpleTunerError, code=7):
    """A run folder that another process is using."""


class ModelError(SimpleTunerError, code=8):
    """Weights that are missing, damaged or belong to another model."""


class CheckpointError(SimpleTunerError, code=9):
    """No checkpoint to resume from, or one that does not fit this configuration."""


class CacheError(SimpleTunerError, code=10):
    """A cache that cannot be used and cannot be rebuilt."""


class MissingExtra(SimpleTunerError, code=11):
    """An optional package that is not installed; the message holds the command that installs it."""


class StorageError(SimpleTunerError, code=12):
    """A file system that fails: read-only, an I/O error, a file or folder that vanished."""


DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# What a person can do about the errors that occur most.
STORAGE_HINTS = {
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EPERM: "check the permissions of the file and of its folder",
    errno.EIO: "the disk or the network connection to it failed; check the device",
    errno.ENOENT: "it was removed or renamed meanwhile",
    errno.ESTALE: "the network file system was unmounted or replaced",
    errno.EISDIR: "a folder has the name of this file; rename the folder",
    errno.ENOTDIR: "a file has the name of this folder; rename the file",
    errno.EEXIST: "a file has the name of this folder; rename the file",
    errno.ELOOP: "a symbolic link points to itself; remove it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "too many files are open; raise the limit with ulimit -n",
}


def storage_error(failure: str, error: OSError) -> SimpleTunerError:
    """Return the error for users: DiskFull for a full disk, otherwise StorageError.

    failure: a sentence part such as "checkpoint-5 cannot be written".
    """
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in DISK_FULL_ERRNOS:
        return DiskFull(f"{failure}: {reason}. Free some space and run the same command again")
    hint = STORAGE_HINTS.get(error.errno or 0)
    return StorageError(f"{failure}: {reason}{f'; {hint}' if hint else ''}")


class ProcessLost(SimpleTunerError, code=13):
    """Another process of the same run ended without giving a reason, or is out of reach."""


class TrainingStopped(SimpleTunerError, code=75):
    """A stop on request after a checkpoint was saved; the same command resumes the run."""
