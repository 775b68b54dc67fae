"""Labels of runs: names, tags and notes that users write, in .simpletuner/labels.json by run id."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from pydantic import ValidationError

from simpletuner.atomic_io import write_atomically
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.schemas.library import RunLabel
from simpletuner.server.workspace import Workspace

NO_LABEL = RunLabel()


class RunLabels:
    """The labels of the runs of a workspace. Thread-safe."""

    def __init__(self, workspace: Workspace) -> None:
        self._path: Path = workspace.server_dir / "labels.json"
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._labels: dict[str, RunLabel] = {}

    def of(self, run: str) -> RunLabel:
        """Return the label of a run."""
        with self._lock:
            return self._read().get(run, NO_LABEL)

    def write(self, run: str, label: RunLabel) -> None:
        """Replace the label of a run; an empty one is removed."""
        with self._lock:
            labels = {**self._read(), run: label}
            if label == NO_LABEL:
                del labels[run]
            content = {id: entry.model_dump() for id, entry in labels.items()}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(content, indent=1, ensure_ascii=False))

    def _read(self) -> dict[str, RunLabel]:
        """Return all labels; the file is read again when it has changed."""
        try:
            status = self._path.stat()
        except OSError:
            return {}
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            labels = {}
            for id, content in (read_json_object(self._path) or {}).items():
                try:
                    labels[id] = RunLabel.model_validate(content)
                except ValidationError:
                    continue  # written by another version
            self._labels, self._stamp = labels, stamp
        return self._labels
