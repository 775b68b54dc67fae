"""The order of the queue and its flags, stored in queue.json; which jobs start on which devices.

Jobs start in the order of the queue as soon as there are enough free devices. A job that needs more
devices than are free waits, and a later job that needs fewer may start before it, which uses
devices that would be idle. How long a training takes is not known, so every such overtaking may
delay the waiting job. A job is therefore overtaken at most MAX_OVERTAKES times; from then on all
devices that become free are reserved for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simpletuner.atomic_io import write_atomically
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.schemas.jobs import Job

MAX_OVERTAKES = 4


@dataclass(frozen=True)
class DeviceRequest:
    """A job that is ready to start.

    count: number of devices that it needs. overtaken: how often a later job started before it.
    """

    job: str
    count: int
    overtaken: int = 0


@dataclass(frozen=True)
class DeviceAssignment:
    """The jobs to start, with their devices, and the new number of overtakings of waiting jobs."""

    started: dict[str, tuple[str, ...]]
    overtaken: dict[str, int]


def assign_devices(waiting: Iterable[DeviceRequest], free: Sequence[str]) -> DeviceAssignment:
    """Assign the free devices to the waiting jobs, which are in the order of the queue."""
    free = tuple(free)
    started: dict[str, tuple[str, ...]] = {}
    overtaken: dict[str, int] = {}
    skipped: dict[str, int] = {}
    for request in waiting:
        if request.count > len(free):
            skipped[request.job] = request.overtaken
        elif all(times < MAX_OVERTAKES for times in skipped.values()):
            started[request.job], free = free[: request.count], free[request.count :]
            skipped = {job: times + 1 for job, times in skipped.items()}
            overtaken |= skipped
    return DeviceAssignment(started, overtaken)


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


def queued_in_order(jobs: Iterable[Job], order: QueueOrder) -> list[Job]:
    """Return the queued jobs in order; jobs that `order` does not contain come last."""
    positions = {id: position for position, id in enumerate(order.jobs)}
    queued = [job for job in jobs if job.state == "queued"]
    return sorted(queued, key=lambda job: (positions.get(job.id, len(positions)), job.queued_t))


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
