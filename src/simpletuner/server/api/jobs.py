"""The queue, and what a run is asked to do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from simpletuner.server.home import Here
from simpletuner.server.wire.jobs import Job, JobAsk, Queue, QueueWrite
from simpletuner.server.wire.runs import ResumeAsk, RunSummary, StopAsk

router = APIRouter(prefix="/api/v1")


@router.get("/queue", tags=["jobs"])
def queue(home: Here) -> Queue:
    return home.jobs.queue()


@router.put("/queue", tags=["jobs"])
def write_queue(body: QueueWrite, home: Here) -> Queue:
    return home.jobs.arrange(body)


@router.post("/jobs", tags=["jobs"], status_code=201)
def enqueue(body: JobAsk, home: Here) -> Job:
    return home.jobs.enqueue(body)


@router.get("/jobs/{id}", tags=["jobs"])
def job(id: str, home: Here) -> Job:
    return home.jobs.job(id)


@router.delete("/jobs/{id}", tags=["jobs"], status_code=204)
def withdraw(id: str, home: Here) -> None:
    home.jobs.withdraw(id)


@router.post("/runs/{id}/resume", tags=["jobs"], status_code=201)
def resume(id: str, body: ResumeAsk, home: Here) -> Job:
    return home.jobs.resume(id, body)


@router.post("/runs/{id}/stop", tags=["runs"])
def stop(id: str, body: StopAsk, home: Here) -> RunSummary:
    home.jobs.stop(id, body.insist)
    return home.runs.summary(id)


@router.post("/runs/{id}/save", tags=["runs"])
def save(id: str, body: dict[str, Any], home: Here) -> RunSummary:
    home.jobs.request(id, "save")
    return home.runs.summary(id)


@router.post("/runs/{id}/sample", tags=["runs"])
def sample(id: str, body: dict[str, Any], home: Here) -> RunSummary:
    """Draw the validation pictures now."""
    home.jobs.request(id, "validate")
    return home.runs.summary(id)
