"""Routes for the job queue, and for commands to a run: stop, resume, save, sample."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from simpletuner.server.schemas.jobs import Job, JobRequest, Queue, QueueWrite
from simpletuner.server.schemas.runs import ResumeRequest, RunSummary, StopRequest
from simpletuner.server.services import ServicesDep

router = APIRouter(prefix="/api/v1")


@router.get("/queue", tags=["jobs"])
def get_queue(services: ServicesDep) -> Queue:
    """Return the queue."""
    return services.jobs.get_queue()


@router.put("/queue", tags=["jobs"])
def update_queue(body: QueueWrite, services: ServicesDep) -> Queue:
    """Change the order or the flags of the queue."""
    return services.jobs.update_queue(body)


@router.post("/jobs", tags=["jobs"], status_code=201)
def enqueue_job(body: JobRequest, services: ServicesDep) -> Job:
    """Queue a draft for training or for a dry run."""
    job = services.jobs.enqueue(body)
    draft = services.drafts.get(body.draft)
    seconds = services.plans.estimated_seconds(draft.config, draft.datasets)
    if job.kind == "train" and seconds is not None:
        services.step_times.record_estimate(job.id, seconds)
    return job


@router.get("/jobs/{id}", tags=["jobs"])
def get_job(id: str, services: ServicesDep) -> Job:
    """Return a job."""
    return services.jobs.get_job(id)


@router.delete("/jobs/{id}", tags=["jobs"], status_code=204)
def cancel_job(id: str, services: ServicesDep) -> None:
    """Remove a queued job, or kill a dry run."""
    services.jobs.cancel(id)


@router.post("/runs/{id}/resume", tags=["jobs"], status_code=201)
def resume_run(id: str, body: ResumeRequest, services: ServicesDep) -> Job:
    """Queue a run again, from its newest or a given checkpoint."""
    return services.jobs.resume(id, body)


@router.post("/runs/{id}/stop", tags=["runs"])
def stop_run(id: str, body: StopRequest, services: ServicesDep) -> RunSummary:
    """Stop a run."""
    services.jobs.stop(id, body.insist)
    return services.runs.summary(id)


@router.post("/runs/{id}/save", tags=["runs"])
def request_checkpoint(id: str, body: dict[str, Any], services: ServicesDep) -> RunSummary:
    """Save a checkpoint after the current step."""
    services.jobs.request_control(id, "save")
    return services.runs.summary(id)


@router.post("/runs/{id}/sample", tags=["runs"])
def request_validation_images(id: str, body: dict[str, Any], services: ServicesDep) -> RunSummary:
    """Generate the validation images after the current step."""
    services.jobs.request_control(id, "validate")
    return services.runs.summary(id)
