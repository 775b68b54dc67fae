"""Pictures and captions: /api/v1/datasets, and the folders that a dataset may be made of."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.server.api_errors import abort
from simpletuner.server.dataset_service import DEFAULT_SEED, CropSettings
from simpletuner.server.file_responses import make_file_response
from simpletuner.server.schemas import datasets as wire
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
    """How training would cut the pictures, by the dataset's fields; seed: of the run, for random crops."""
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
def list_datasets(home: ServicesDep) -> list[wire.DatasetInfo]:
    return home.datasets.list_datasets()


@router.post("/datasets", status_code=201)
def create_dataset(ask: wire.DatasetRequest, home: ServicesDep) -> wire.DatasetInfo:
    return home.datasets.create(ask.name, ask.path)


@router.get("/datasets/{name}")
def get_dataset(name: str, home: ServicesDep) -> wire.DatasetInfo:
    return home.datasets.get_info(name)


@router.get("/datasets/{name}/items")
def list_items(
    name: str,
    home: ServicesDep,
    cut: CropSettingsDep,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 60,
    only: Literal["all", "captioned", "uncaptioned", "refused"] = "all",
) -> wire.DatasetItemPage:
    return home.datasets.list_items(name, offset, limit, only, cut)


@router.get("/datasets/{name}/buckets")
def list_buckets(name: str, home: ServicesDep, cut: CropSettingsDep) -> list[wire.BucketCount]:
    return home.datasets.count_buckets(name, cut)


@router.get("/datasets/{name}/files/{path:path}", response_class=Response)
def get_dataset_file(name: str, path: str, home: ServicesDep, width: int | None = None) -> Response:
    """The picture as it is, or as a JPEG of about `width` pixels."""
    picture = home.datasets.image_path(name, path)
    if width is None:
        return make_file_response(picture)
    fresh = {"cache-control": f"private, max-age={THUMBNAIL_MAX_AGE_S}"}
    return Response(
        get_thumbnail(picture, width, home.workspace.server_dir / "thumbs"),
        media_type="image/jpeg",
        headers=fresh,
    )


@router.put("/datasets/{name}/files/{path:path}", openapi_extra=BINARY_BODY)
async def upload_file(
    name: str, path: str, request: Request, home: ServicesDep
) -> wire.UploadResult:
    """A picture, a caption (.txt) or an archive (.zip) as the whole body. Nothing is ever overwritten."""
    length = int(request.headers.get("content-length") or 0)
    limit = home.settings.max_upload_bytes
    incoming = await run_in_threadpool(home.datasets.begin_upload, name, path, length, limit)
    try:
        gathered = bytearray()
        async for chunk in request.stream():
            gathered += chunk
            if len(gathered) >= BLOCK_BYTES:
                await run_in_threadpool(incoming.write, bytes(gathered))
                gathered.clear()
        await run_in_threadpool(incoming.write, bytes(gathered))
        saved, refused = await run_in_threadpool(incoming.finish)
    except ClientDisconnect:
        abort(400, "the upload was cut off")
    finally:
        await run_in_threadpool(incoming.discard)
    await run_in_threadpool(home.datasets.invalidate, name)
    return wire.UploadResult(saved=saved, refused=refused)


@router.put("/datasets/{name}/captions/{path:path}")
def write_caption(
    name: str, path: str, ask: wire.CaptionWrite, home: ServicesDep, cut: CropSettingsDep
) -> wire.DatasetItemPage:
    """The caption of one picture, and the picture's item as it is then."""
    return home.datasets.write_caption(name, path, ask, cut)


@router.get("/folders")
def browse_folder(home: ServicesDep, path: str = "") -> wire.FolderListing:
    return home.datasets.browse_folder(path)
