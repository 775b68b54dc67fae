"""Pictures and captions: /api/v1/datasets, and the folders that a dataset may be made of."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from simpletuner.data.geometry import Framing
from simpletuner.server.datasets import SEED, View
from simpletuner.server.files import sent
from simpletuner.server.home import Here
from simpletuner.server.refusal import refuse
from simpletuner.server.thumbs import thumbnail
from simpletuner.server.uploads import BLOCK
from simpletuner.server.wire import datasets as wire

router = APIRouter(prefix="/api/v1", tags=["datasets"])
BYTES = {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}}
THUMBNAIL_FRESH_S = 300


def view(
    resolution: Annotated[float, Query(gt=0, le=16384)] = 1024,
    resolution_type: Literal["pixel", "area", "pixel_area"] = "pixel_area",
    crop: bool = True,
    crop_aspect: Literal["square", "preserve", "closest"] = "preserve",
    crop_style: Literal["center", "random", "corner"] = "center",
    seed: Annotated[int, Query(ge=0, lt=2**63)] = SEED,
) -> View:
    """How training would cut the pictures, by the dataset's fields; seed: of the run, for random crops."""
    framing = Framing(
        resolution=resolution,
        resolution_type=resolution_type,
        crop=crop,
        crop_aspect=crop_aspect,
        crop_style=crop_style,
    )
    return View(framing, seed)


Cut = Annotated[View, Depends(view)]


@router.get("/datasets")
def datasets(home: Here) -> list[wire.DatasetInfo]:
    return home.datasets.all()


@router.post("/datasets", status_code=201)
def new_dataset(ask: wire.DatasetAsk, home: Here) -> wire.DatasetInfo:
    return home.datasets.make(ask.name, ask.path)


@router.get("/datasets/{name}")
def dataset(name: str, home: Here) -> wire.DatasetInfo:
    return home.datasets.info(name)


@router.get("/datasets/{name}/items")
def items(
    name: str,
    home: Here,
    cut: Cut,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 60,
    only: Literal["all", "captioned", "uncaptioned", "refused"] = "all",
) -> wire.Items:
    return home.datasets.items(name, offset, limit, only, cut)


@router.get("/datasets/{name}/buckets")
def buckets(name: str, home: Here, cut: Cut) -> list[wire.Bucket]:
    return home.datasets.buckets(name, cut)


@router.get("/datasets/{name}/files/{path:path}", response_class=Response)
def dataset_file(name: str, path: str, home: Here, width: int | None = None) -> Response:
    """The picture as it is, or as a JPEG of about `width` pixels."""
    picture = home.datasets.picture(name, path)
    if width is None:
        return sent(picture)
    fresh = {"cache-control": f"private, max-age={THUMBNAIL_FRESH_S}"}
    return Response(
        thumbnail(picture, width, home.place.own / "thumbs"), media_type="image/jpeg", headers=fresh
    )


@router.put("/datasets/{name}/files/{path:path}", openapi_extra=BYTES)
async def upload(name: str, path: str, request: Request, home: Here) -> wire.Uploaded:
    """A picture, a caption (.txt) or an archive (.zip) as the whole body. Nothing is ever overwritten."""
    length = int(request.headers.get("content-length") or 0)
    limit = home.settings.max_upload_bytes
    incoming = await run_in_threadpool(home.datasets.begin, name, path, length, limit)
    try:
        gathered = bytearray()
        async for chunk in request.stream():
            gathered += chunk
            if len(gathered) >= BLOCK:
                await run_in_threadpool(incoming.write, bytes(gathered))
                gathered.clear()
        await run_in_threadpool(incoming.write, bytes(gathered))
        saved, refused = await run_in_threadpool(incoming.finish)
    except ClientDisconnect:
        refuse(400, "the upload was cut off")
    finally:
        await run_in_threadpool(incoming.discard)
    await run_in_threadpool(home.datasets.uploaded, name)
    return wire.Uploaded(saved=saved, refused=refused)


@router.put("/datasets/{name}/captions/{path:path}")
def caption(name: str, path: str, ask: wire.CaptionWrite, home: Here, cut: Cut) -> wire.Items:
    """The caption of one picture, and the picture's item as it is then."""
    return home.datasets.caption(name, path, ask, cut)


@router.get("/folders")
def folders(home: Here, path: str = "") -> wire.Folder:
    return home.datasets.folders(path)
