"""Messages about jobs and their queue."""

from __future__ import annotations

from typing import Literal

from simpletuner.server.schemas.base import ApiModel, JobState, Message

JobKind = Literal["train", "rehearse", "generate", "caption", "export", "merge", "check", "inspect"]


class JobRequest(ApiModel):
    """A job to queue.

    kind "rehearse": a dry run of a few steps on the bundled tiny model, on the CPU.
    """

    draft: str
    kind: Literal["train", "rehearse"] = "train"


class Job(ApiModel):
    """One process: a training, or a tool such as a generation. Queued, running or ended.

    advice: what to change after a failure, or "". run_dir: the run folder, "" for a dry run. begun:
    true if the run folder existed when this message was made. device_count: number of GPUs that it
    asks for, None for all. draft: id of the draft that it was made from, "" for a resumed run.
    """

    id: str
    run: str
    name: str
    kind: JobKind
    state: JobState
    devices: str
    queued_t: float
    started_t: float | None
    ended_t: float | None
    exit_code: int | None
    message: Message
    advice: Message
    last_lines: list[str]
    run_dir: str = ""
    begun: bool = False
    device_count: int | None = 1
    draft: str = ""


class Queue(ApiModel):
    """The queue.

    jobs: queued ones in their order, then active ones, then ended ones, newest first.
    """

    paused: bool
    continue_on_error: bool
    jobs: list[Job]


class QueueWrite(ApiModel):
    """Changes to the queue; fields that are None stay as they are.

    order: ids of all queued jobs.
    """

    paused: bool | None = None
    continue_on_error: bool | None = None
    order: list[str] | None = None
