"""The state of a job, derived from what its folder and its processes show.

    draft -> queued -> starting -> caching -> running -> stopping
    -> stopped | failed | done | lost -> queued

A state is never stored, so no crash can leave a wrong one behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from simpletuner.server.schemas.base import JobState

Phase = Literal["starting", "caching", "running"]
Outcome = Literal["done", "stopped", "failed"]

PHASES: tuple[Phase, ...] = get_args(Phase)
ACTIVE_STATES: tuple[JobState, ...] = (*PHASES, "stopping")
ENDED_STATES: tuple[JobState, ...] = ("stopped", "failed", "done", "lost")


@dataclass(frozen=True)
class ObservedJob:
    """The observations of a queued job.

    launched: its runner lock exists. alive: a process holds the lock. outcome: how the job ended,
    None if that was not recorded.
    """

    launched: bool = False
    alive: bool = False
    phase: Phase = "starting"
    stop_requested: bool = False
    outcome: Outcome | None = None


def derive_state(job: ObservedJob) -> JobState:
    """Return the state that follows from the observations."""
    if not job.launched:
        return "queued"
    if job.alive:
        return "stopping" if job.stop_requested else job.phase
    if job.outcome is not None:
        return job.outcome
    # A job that was asked to stop and then vanished did what it was asked to do.
    return "stopped" if job.stop_requested else "lost"
