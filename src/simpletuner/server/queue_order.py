"""The order of the queue and its flags, stored in queue.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simpletuner.atomic_io import write_atomically
from simpletuner.server.file_reader import read_json_object


@dataclass(frozen=True)
class QueueOrder:
    """jobs: ids of the queued jobs in their order."""

    jobs: tuple[str, ...] = ()
    paused: bool = False
    continue_on_error: bool = False

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> QueueOrder:
        jobs = tuple(job for job in content.get("jobs", ()) if isinstance(job, str))
        return cls(
            jobs=jobs,
            paused=content.get("paused") is True,
            continue_on_error=content.get("continue_on_error") is True,
        )


class QueueOrderStore:
    """Reads and writes queue.json, with a second copy in case a user deletes or damages the first.

    Nothing is cached, so that several servers of one workspace see each other's changes. Without
    both files, the jobs are ordered by the time at which they were queued.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "queue.json"
        self.backup_path = folder / "queue.backup.json"

    def read(self) -> QueueOrder:
        content = read_json_object(self.path) or read_json_object(self.backup_path)
        return QueueOrder.from_dict(content or {})

    def write(self, order: QueueOrder) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(order)) + "\n"
        write_atomically(self.path, text)
        write_atomically(self.backup_path, text)
