"""Routes for datasets (images and captions), and for browsing folders that can become one."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.server import sample_datasets
from simpletuner.server.api_errors import abort
from simpletuner.server.dataset_items import DEFAULT_SEED, CropSettings
from simpletuner.server.file_responses import make_file_response
from simpletuner.server.folder_browser import list_folder
from simpletuner.server.schemas import datasets as schemas
from simpletuner.server.schemas.inspection import Inspection, InspectionRequest
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.services import ServicesDep
from simpletuner.server.thumbnails import get_thumbnail
from simpletuner.server.uploads import BLOCK_BYTES

router = APIRouter(prefix="/api/v1", tags=["datasets"])
BINARY_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}}
THUMBNAIL_MAX_AGE_S = 300


def crop_settings(
    resolution: Annotated[float, Query(gt=0, le=16384)] = 1024,
    resolution_type: Literal["pixel", "area", "pixel_area"] = "pixel_area",
    crop: bool = True,
    crop_aspect: Literal["square", "preserve", "closest"] = "preserve",
    crop_style: Literal["center", "random", "corner"] = "center",
    seed: Annotated[int, Query(ge=0, lt=2**63)] = DEFAULT_SEED,
) -> CropSettings:
    """Read the resize and crop settings from the query; they are named like a dataset's fields.

    seed: the seed of the run, which random crops depend on.
    """
    framing = ResizeCropConfig(
        resolution=resolution,
        resolution_type=resolution_type,
        crop=crop,
        crop_aspect=crop_aspect,
        crop_style=crop_style,
    )
    return CropSettings(framing, seed)


CropSettingsDep = Annotated[CropSettings, Depends(crop_settings)]


@router.get("/datasets")
def list_datasets(services: ServicesDep) -> list[schemas.DatasetInfo]:
    """Return all datasets."""
    return services.datasets.list_datasets()


@router.post("/datasets", status_code=201)
def create_dataset(body: schemas.DatasetRequest, services: ServicesDep) -> schemas.DatasetInfo:
    """Create a dataset, or add an existing folder."""
    return services.datasets.create(body.name, body.path)


@router.post("/samples", status_code=201)
def create_sample_datasets(services: ServicesDep) -> list[schemas.DatasetInfo]:
    """Copy the images of the packaged example into the workspace, as two datasets."""
    return sample_datasets.create(services.datasets)


@router.get("/datasets/{name}")
def get_dataset(name: str, services: ServicesDep) -> schemas.DatasetInfo:
    """Return a dataset."""
    return services.datasets.get_info(name)


@router.get("/datasets/{name}/items")
def list_items(
    name: str,
    services: ServicesDep,
    crop: CropSettingsDep,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 60,
    only: Literal[
        "all", "captioned", "uncaptioned", "refused", "excluded", "duplicate", "small"
    ] = "all",
    sort: Literal["name", "shortest", "longest"] = "name",
) -> schemas.DatasetItemPage:
    """Return a page of the images of a dataset; shortest, longest: by their captions."""
    return services.datasets.list_items(name, offset, limit, only, crop, sort)


@router.put("/datasets/{name}/exclusions")
def exclude_images(
    name: str, body: schemas.ExclusionWrite, services: ServicesDep
) -> schemas.DatasetInfo:
    """Leave images out of later runs, or use them again; no file is changed."""
    return services.datasets.exclude(name, body.files, body.excluded)


@router.put("/datasets/{name}/crop-boxes/{path:path}")
def set_crop_box(
    name: str, path: str, body: schemas.CropBoxWrite, services: ServicesDep, crop: CropSettingsDep
) -> schemas.DatasetItemPage:
    """Use a part of an image in later runs; no file is changed. Return the updated image."""
    return services.datasets.set_crop_box(name, path, body.box, crop)


@router.get("/datasets/{name}/findings")
def find_conspicuous_images(name: str, services: ServicesDep) -> schemas.DatasetFindings:
    """Return the images that are copies of others, and those that are very small."""
    return services.datasets.findings(name)


@router.get("/datasets/{name}/buckets")
def list_buckets(
    name: str, services: ServicesDep, crop: CropSettingsDep
) -> list[schemas.BucketCount]:
    """Return the number of images per bucket."""
    return services.datasets.count_buckets(name, crop)


@router.get("/datasets/{name}/files/{path:path}", response_class=Response)
def get_dataset_file(
    name: str, path: str, services: ServicesDep, width: int | None = None
) -> Response:
    """Return the original image, or a JPEG thumbnail about `width` pixels wide."""
    image = services.datasets.image_path(name, path)
    if width is None:
        return make_file_response(image)
    fresh = {"cache-control": f"private, max-age={THUMBNAIL_MAX_AGE_S}"}
    return Response(
        get_thumbnail(image, width, services.workspace.server_dir / "thumbs"),
        media_type="image/jpeg",
        headers=fresh,
    )


@router.put("/datasets/{name}/files/{path:path}", openapi_extra=BINARY_BODY)
async def upload_file(
    name: str, path: str, request: Request, services: ServicesDep
) -> schemas.UploadResult:
    """Upload an image, a caption (.txt) or an archive (.zip) as the request body.

    An existing file is never overwritten.
    """
    length = int(request.headers.get("content-length") or 0)
    limit = services.settings.max_upload_bytes
    incoming = await run_in_threadpool(services.datasets.begin_upload, name, path, length, limit)
    try:
        buffer = bytearray()
        async for chunk in request.stream():
            buffer += chunk
            if len(buffer) >= BLOCK_BYTES:
                await run_in_threadpool(incoming.write, bytes(buffer))
                buffer.clear()
        await run_in_threadpool(incoming.write, bytes(buffer))
        saved, refused = await run_in_threadpool(incoming.finish)
    except ClientDisconnect:
        abort(400, "the upload was interrupted before all bytes arrived")
    finally:
        await run_in_threadpool(incoming.discard)
    await run_in_threadpool(services.datasets.invalidate, name)
    return schemas.UploadResult(saved=saved, refused=refused)


@router.put("/datasets/{name}/captions/{path:path}")
def write_caption(
    name: str, path: str, body: schemas.CaptionWrite, services: ServicesDep, crop: CropSettingsDep
) -> schemas.DatasetItemPage:
    """Write the caption of one image; return the image's updated item."""
    return services.datasets.write_caption(name, path, body, crop)


@router.get("/datasets/{name}/inspection")
def get_inspection(name: str, services: ServicesDep) -> Inspection:
    """Return the newest inspection of a dataset, and its job."""
    return services.inspections.get(name)


@router.post("/datasets/{name}/inspection", status_code=201)
def start_inspection(name: str, body: InspectionRequest, services: ServicesDep) -> Job:
    """Queue an inspection: sizes, buckets, captions, copies, blurred and tiny images."""
    return services.inspections.start(name, body)


@router.get("/folders")
def browse_folder(services: ServicesDep, path: str = "") -> schemas.FolderListing:
    """Return the content of an allowed folder."""
    return list_folder(services.workspace, path)
