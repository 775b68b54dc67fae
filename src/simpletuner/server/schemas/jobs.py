"""The queue."""

from __future__ import annotations

from typing import Literal

from simpletuner.server.schemas.base import ApiModel, JobState


class JobRequest(ApiModel):
    """kind rehearse: a few steps on the tiny bundled model, on the CPU."""

    draft: str
    kind: Literal["train", "rehearse"] = "train"


class Job(ApiModel):
    """One process to run, or that ran. advice: what to change after a failure, "" for none. run_dir: of its
    run, "" for a rehearsal. begun: whether that folder was there when this was told.
    """

    id: str
    run: str
    name: str
    kind: Literal["train", "rehearse"]
    state: JobState
    devices: str
    queued_t: float
    started_t: float | None
    ended_t: float | None
    exit_code: int | None
    message: str
    advice: str
    last_lines: list[str]
    run_dir: str = ""
    begun: bool = False


class Queue(ApiModel):
    """jobs: those to come in their order, then those that run, then the ended ones, newest first."""

    paused: bool
    continue_on_error: bool
    jobs: list[Job]


class QueueWrite(ApiModel):
    """Only what is given is changed. order: ids of all queued jobs."""

    paused: bool | None = None
    continue_on_error: bool | None = None
    order: list[str] | None = None
