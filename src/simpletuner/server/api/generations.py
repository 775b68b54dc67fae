"""Routes for generating images, and for the library of LoRAs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from simpletuner.server.file_responses import make_file_response
from simpletuner.server.sampling_previews import PREVIEW_FILE, make_preview_response
from simpletuner.server.schemas.generations import (
    Generation,
    GenerationRequest,
    LoraExportRequest,
    LoraInfo,
)
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.schemas.library import TrashEntry
from simpletuner.server.services import ServicesDep
from simpletuner.server.thumbnails import get_thumbnail

router = APIRouter(prefix="/api/v1")


@router.get("/generations", tags=["generations"])
def list_generations(services: ServicesDep) -> list[Generation]:
    """Return the newest generations."""
    return services.generations.list_newest()


@router.post("/generations", tags=["generations"], status_code=201)
def create_generation(body: GenerationRequest, services: ServicesDep) -> Generation:
    """Queue a generation."""
    return services.generations.create(body)


@router.get("/generations/{id}", tags=["generations"])
def get_generation(id: str, services: ServicesDep) -> Generation:
    """Return a generation with its images so far."""
    return services.generations.get(id)


@router.delete("/generations/{id}", tags=["generations"])
def delete_generation(id: str, services: ServicesDep) -> TrashEntry:
    """Move a generation to the trash, and cancel it."""
    return services.generations.delete(id)


@router.get("/generations/{id}/preview", tags=["generations"], response_class=Response)
def get_generation_preview(id: str, services: ServicesDep) -> Response:
    """Return the rough preview of the images that are being sampled, a JPEG."""
    return make_preview_response(services.generations.file_path(id, PREVIEW_FILE))


@router.get("/generations/{id}/files/{path:path}", tags=["generations"], response_class=Response)
def get_generated_image(
    id: str,
    path: str,
    services: ServicesDep,
    width: Annotated[int | None, Query(ge=1, le=4096)] = None,
) -> Response:
    """Return a generated image, or a JPEG thumbnail about `width` pixels wide."""
    image = services.generations.image_path(id, path)
    if width is None:
        return make_file_response(image)
    thumbnail = get_thumbnail(image, width, services.workspace.server_dir / "thumbs")
    return Response(thumbnail, media_type="image/jpeg")


@router.get("/loras", tags=["loras"])
def list_loras(services: ServicesDep) -> list[LoraInfo]:
    """Return the LoRA files of all runs and of the folder loras/."""
    return services.loras.list_loras()


@router.post("/loras", tags=["loras"], status_code=201)
def start_lora_job(body: LoraExportRequest, services: ServicesDep) -> Job:
    """Queue a job that checks, converts, adds up or merges LoRAs."""
    return services.loras.start(body)


@router.get("/loras/file", tags=["loras"], response_class=Response)
def download_lora(path: str, services: ServicesDep) -> Response:
    """Download a LoRA file."""
    file = services.loras.find(path)
    return make_file_response(file, file.name)


@router.delete("/loras/file", tags=["loras"])
def delete_lora(path: str, services: ServicesDep) -> TrashEntry:
    """Move a file of the folder loras/ to the trash."""
    return services.loras.delete(path)
