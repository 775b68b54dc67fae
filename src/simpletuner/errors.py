"""Everything that can go wrong and that a person can mend.

SimpleTunerError            1   the root; its text is the whole message, no traceback is shown
├── ConfigError             2   options, files named by options; carries every problem at once
├── DataError               3   pictures and captions
├── TrainingDiverged        4   loss or gradient is not a finite number
├── DiskFull                5   no room for what is about to be written
├── DownloadError           6   no network, no such repository, gated
├── RunLocked               7   another process works in this run folder
├── ModelError              8   weights that are not what they should be
├── CheckpointError         9   nothing to resume from, or it does not fit this config
├── CacheError             10   a cache that cannot be used and could not be rebuilt
├── MissingExtra           11   an optional package is not installed
└── Stopped                75   stopped on request with a checkpoint: the same command goes on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the configuration, ready to print.

    where: "config.json:7:3", "--learning_rate" or "SIMPLETUNER_SEED"; empty when it concerns the whole.
    what: one sentence: what was read, what is allowed, how to mend it.
    """

    location: str
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}" if self.location else self.message


class SimpleTunerError(Exception):
    """A failure explained in one sentence; `exit_code` is what the process ends with."""

    exit_code = 1

    def __init_subclass__(cls, code: int | None = None) -> None:
        cls.exit_code = cls.exit_code if code is None else code


class ConfigError(SimpleTunerError, code=2):
    """All problems of a configuration together."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        self.problems = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(SimpleTunerError, code=3):
    """Pictures or captions that cannot be trained on."""


class TrainingDiverged(SimpleTunerError, code=4):
    """The loss or the gradient stopped being a finite number."""


class DiskFull(SimpleTunerError, code=5):
    """There is no room for what is about to be written."""


class DownloadError(SimpleTunerError, code=6):
    """Weights could not be fetched."""


class RunLocked(SimpleTunerError, code=7):
    """Another process works in this run folder."""


class ModelError(SimpleTunerError, code=8):
    """Weights that are not what they should be."""


class CheckpointError(SimpleTunerError, code=9):
    """Nothing to resume from, or it does not belong to this configuration."""


class CacheError(SimpleTunerError, code=10):
    """A cache that cannot be used and could not be rebuilt."""


class MissingExtra(SimpleTunerError, code=11):
    """An optional package is not installed; the text says what to type."""


class TrainingStopped(SimpleTunerError, code=75):
    """Stopped on request, with a checkpoint; the same command goes on."""
