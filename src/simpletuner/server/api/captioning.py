"""Routes for the captions of a dataset as a whole."""

from __future__ import annotations

from fastapi import APIRouter

from simpletuner.server.schemas.captioning import (
    CaptionEditRequest,
    CaptionEditResult,
    CaptioningInfo,
    CaptioningRequest,
    CaptionOverview,
)
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.services import ServicesDep

router = APIRouter(prefix="/api/v1", tags=["captions"])


@router.get("/datasets/{name}/overview")
def get_caption_overview(name: str, services: ServicesDep) -> CaptionOverview:
    """Return the tags and the lengths of the captions of a dataset."""
    return services.caption_desk.overview(name)


@router.post("/datasets/{name}/caption-edits")
def edit_captions(name: str, body: CaptionEditRequest, services: ServicesDep) -> CaptionEditResult:
    """Change all captions of a dataset, or preview the change."""
    return services.caption_desk.edit(name, body)


@router.get("/captioning")
def get_captioning(services: ServicesDep) -> CaptioningInfo:
    """Return the models for captions and the captioning jobs."""
    return services.caption_desk.captioning_info()


@router.post("/captioning", status_code=201)
def start_captioning(body: CaptioningRequest, services: ServicesDep) -> Job:
    """Queue the captioning of a dataset by a model."""
    return services.caption_desk.start_captioning(body)
