"""Labels of runs: names, tags and notes that users write, in .simpletuner/labels.json by run id."""

from __future__ import annotations

import threading
from typing import Any

from pydantic import ValidationError

from simpletuner.server.schemas.library import RunLabel
from simpletuner.server.watched_file import WatchedJsonFile
from simpletuner.server.workspace import Workspace

NO_LABEL = RunLabel()


class RunLabels:
    """The labels of the runs of a workspace. Thread-safe."""

    def __init__(self, workspace: Workspace) -> None:
        self._file = WatchedJsonFile(workspace.server_dir / "labels.json", _parse)
        self._lock = threading.Lock()

    def of(self, run: str) -> RunLabel:
        """Return the label of a run."""
        with self._lock:
            return self._file.read().get(run, NO_LABEL)

    def write(self, run: str, label: RunLabel) -> None:
        """Replace the label of a run; an empty one is removed."""
        with self._lock:
            labels = {**self._file.read(), run: label}
            if label == NO_LABEL:
                del labels[run]
            self._file.write({id: entry.model_dump() for id, entry in labels.items()})


def _parse(value: Any) -> RunLabel | None:
    """Return a label; None for one of another version."""
    try:
        return RunLabel.model_validate(value)
    except ValidationError:
        return None
