"""The queue, and what a run is asked to do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from simpletuner.server.schemas.jobs import Job, JobRequest, Queue, QueueWrite
from simpletuner.server.schemas.runs import ResumeRequest, RunSummary, StopRequest
from simpletuner.server.services import ServicesDep

router = APIRouter(prefix="/api/v1")


@router.get("/queue", tags=["jobs"])
def get_queue(home: ServicesDep) -> Queue:
    return home.jobs.get_queue()


@router.put("/queue", tags=["jobs"])
def update_queue(body: QueueWrite, home: ServicesDep) -> Queue:
    return home.jobs.update_queue(body)


@router.post("/jobs", tags=["jobs"], status_code=201)
def enqueue_job(body: JobRequest, home: ServicesDep) -> Job:
    return home.jobs.enqueue(body)


@router.get("/jobs/{id}", tags=["jobs"])
def get_job(id: str, home: ServicesDep) -> Job:
    return home.jobs.get_job(id)


@router.delete("/jobs/{id}", tags=["jobs"], status_code=204)
def cancel_job(id: str, home: ServicesDep) -> None:
    home.jobs.cancel(id)


@router.post("/runs/{id}/resume", tags=["jobs"], status_code=201)
def resume_run(id: str, body: ResumeRequest, home: ServicesDep) -> Job:
    return home.jobs.resume(id, body)


@router.post("/runs/{id}/stop", tags=["runs"])
def stop_run(id: str, body: StopRequest, home: ServicesDep) -> RunSummary:
    home.jobs.stop(id, body.insist)
    return home.runs.summary(id)


@router.post("/runs/{id}/save", tags=["runs"])
def request_checkpoint(id: str, body: dict[str, Any], home: ServicesDep) -> RunSummary:
    home.jobs.request_control(id, "save")
    return home.runs.summary(id)


@router.post("/runs/{id}/sample", tags=["runs"])
def request_validation_images(id: str, body: dict[str, Any], home: ServicesDep) -> RunSummary:
    """Draw the validation pictures now."""
    home.jobs.request_control(id, "validate")
    return home.runs.summary(id)
