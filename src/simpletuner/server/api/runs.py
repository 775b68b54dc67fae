"""Runs: what they came to, their files, and what happens in them as it happens."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Response, WebSocket
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.websockets import WebSocketDisconnect

from simpletuner.server import pictures as stored
from simpletuner.server import tail
from simpletuner.server.files import sent
from simpletuner.server.home import Here, Home
from simpletuner.server.live import Listener, Slow
from simpletuner.server.metrics import metrics as columns
from simpletuner.server.thumbs import thumbnail
from simpletuner.server.wire.live import Follow
from simpletuner.server.wire.runs import LogPart, MarkAsk, Metrics, Picture, RunDetail, RunSummary

TRY_AGAIN = 1013  # of RFC 6455's registry
REFUSED = 1008
GROWING = ("events.jsonl", "train.log")

router = APIRouter(prefix="/api/v1", tags=["runs"])


def folder_of(home: Home, id: str) -> Path:
    """Of a run; where nothing lies while it has none yet. 404 for what is no run."""
    folder = home.runs.find(id)
    if folder is None:
        home.runs.summary(id)
    return folder or Path(os.devnull)


@router.get("/runs")
def runs(home: Here) -> list[RunSummary]:
    return home.runs.summaries()


@router.get("/runs/{id}")
def run(id: str, home: Here) -> RunDetail:
    return home.runs.detail(id)


@router.get("/runs/{id}/metrics")
def metrics(id: str, home: Here, max_points: Annotated[int, Query(ge=4, le=100_000)] = 2000) -> Metrics:
    return columns(folder_of(home, id) / "events.jsonl", max_points)


@router.get("/runs/{id}/pictures")
def pictures(id: str, home: Here) -> list[Picture]:
    return home.runs.pictures(id)


@router.get("/runs/{id}/files/{path:path}", response_class=FileResponse)
def run_file(
    id: str, path: str, home: Here, width: Annotated[int | None, Query(ge=1, le=4096)] = None
) -> Response:
    """A file below the run folder, width: of a thumbnail. A checkpoint's name answers with its LoRA
    file; a LoRA is saved under the run's name."""
    folder = folder_of(home, id)
    file = stored.stored(home.place, folder, path)
    if width is not None:
        return Response(thumbnail(file, width, home.place.own / "thumbs"), media_type="image/jpeg")
    if file.name == stored.LORA:
        where = path.removesuffix(stored.LORA).strip("/").replace("/", "-")
        name = "-".join(part for part in (tail.clean(folder.name), where) if part) + ".safetensors"
        return sent(file, name)
    if path in GROWING:  # what is added while it is sent would exceed the length that was told
        return Response(file.read_bytes(), media_type="text/plain; charset=utf-8")
    return sent(file)


@router.get("/runs/{id}/log")
def log(
    id: str, home: Here, since: int = -65536, limit: Annotated[int, Query(ge=16, le=1 << 20)] = 65536
) -> LogPart:
    """train.log from byte `since` on; negative: so many bytes before its end."""
    return tail.text(folder_of(home, id) / "train.log", since, limit)


@router.put("/runs/{id}/checkpoints/{name}/mark")
def mark(id: str, name: str, body: MarkAsk, home: Here) -> RunDetail:
    """A marked checkpoint is never removed by the training."""
    stored.mark(home.place, folder_of(home, id), name, body.marked)
    return home.runs.detail(id)


@router.websocket("/live")
async def live(socket: WebSocket, home: Here) -> None:
    """Hears Follow, tells Live."""
    await socket.accept()
    if home.live.full:
        await socket.close(TRY_AGAIN, "too many pages are open")
        return
    listener = Listener()
    telling = asyncio.create_task(home.live.tell(listener, socket.send_text))
    hearing = asyncio.create_task(hear(socket, listener))
    both = (telling, hearing)
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in both:
            task.cancel()
        await asyncio.wait(both)
    failures = [task.exception() for task in both if not task.cancelled()]
    for failure in failures:
        if isinstance(failure, Slow):
            await socket.close(TRY_AGAIN, "too slow")
        elif isinstance(failure, ValidationError):
            await socket.close(REFUSED, "not a Follow")
        elif failure is not None and not isinstance(failure, WebSocketDisconnect):
            raise failure


async def hear(socket: WebSocket, listener: Listener) -> None:
    """Until the other side leaves. Raises ValidationError at what is no Follow."""
    while (message := await socket.receive())["type"] != "websocket.disconnect":
        listener.follow = Follow.model_validate_json(message.get("text") or "")
