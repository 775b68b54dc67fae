"""The results of a run: one JSON object per line, appended and flushed as soon as a check ends.

Standard library only: the supervising process reads and writes this file without importing torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    ok: true or false when the check ended or raised; null when it did not run (it was skipped, or
    the time limit stopped it), in which case the next command runs it. seconds: wall time.
    expected_s: duration assumed by the catalog. reason: why it failed or did not run. error: the
    end of a traceback.
    """

    name: str
    group: str
    ok: bool | None
    seconds: float = 0.0
    expected_s: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    error: str = ""

    @property
    def status(self) -> str:
        return {True: "ok", False: "FAILED", None: "not run"}[self.ok]


class ResultsFile:
    """A file of results, one line each; the last line of a check counts.

    Several processes may append to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, result: CheckResult) -> None:
        """Write one line in one system call, so that lines of several processes do not mix."""
        text = json.dumps(asdict(result), default=str) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a process died while writing
                text = "\n" + text
            os.write(descriptor, text.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self) -> dict[str, CheckResult]:
        """Return the last result of each check, in order of first appearance.

        Incomplete lines are ignored.
        """
        results: dict[str, CheckResult] = {}
        if not self.path.exists():
            return results
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                result = CheckResult(**json.loads(text))
            except (ValueError, TypeError):
                continue
            results[result.name] = result
        return results

    def done(self) -> set[str]:
        """Return the names of the checks that need not run again."""
        return {name for name, result in self.read().items() if result.ok is not None}
