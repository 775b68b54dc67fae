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

from simpletuner.server import log_reader
from simpletuner.server import run_artifacts as stored
from simpletuner.server.file_responses import make_file_response
from simpletuner.server.live_broadcaster import SlowSubscriber, Subscriber
from simpletuner.server.run_metrics import read_metrics as columns
from simpletuner.server.schemas.live import FollowRequest
from simpletuner.server.schemas.runs import (
    LogPart,
    MarkRequest,
    RunDetail,
    RunImage,
    RunMetrics,
    RunSummary,
)
from simpletuner.server.services import Services, ServicesDep
from simpletuner.server.thumbnails import get_thumbnail

CLOSE_TRY_AGAIN = 1013  # of RFC 6455's registry
CLOSE_POLICY_VIOLATION = 1008
GROWING_FILES = ("events.jsonl", "train.log")

router = APIRouter(prefix="/api/v1", tags=["runs"])


def get_run_folder(home: Services, id: str) -> Path:
    """Of a run; where nothing lies while it has none yet. 404 for what is no run."""
    folder = home.runs.find_folder(id)
    if folder is None:
        home.runs.summary(id)
    return folder or Path(os.devnull)


@router.get("/runs")
def list_runs(home: ServicesDep) -> list[RunSummary]:
    return home.runs.summaries()


@router.get("/runs/{id}")
def get_run(id: str, home: ServicesDep) -> RunDetail:
    return home.runs.detail(id)


@router.get("/runs/{id}/metrics")
def get_metrics(
    id: str, home: ServicesDep, max_points: Annotated[int, Query(ge=4, le=100_000)] = 2000
) -> RunMetrics:
    return columns(get_run_folder(home, id) / "events.jsonl", max_points)


@router.get("/runs/{id}/pictures")
def list_images(id: str, home: ServicesDep) -> list[RunImage]:
    return home.runs.list_images(id)


@router.get("/runs/{id}/files/{path:path}", response_class=FileResponse)
def get_run_file(
    id: str, path: str, home: ServicesDep, width: Annotated[int | None, Query(ge=1, le=4096)] = None
) -> Response:
    """A file below the run folder, width: of a thumbnail. A checkpoint's name answers with its LoRA
    file; a LoRA is saved under the run's name.
    """
    folder = get_run_folder(home, id)
    file = stored.resolve_artifact(home.workspace, folder, path)
    if width is not None:
        return Response(
            get_thumbnail(file, width, home.workspace.server_dir / "thumbs"),
            media_type="image/jpeg",
        )
    if file.name == stored.LORA_FILE:
        where = path.removesuffix(stored.LORA_FILE).strip("/").replace("/", "-")
        name = (
            "-".join(part for part in (log_reader.replace_surrogates(folder.name), where) if part)
            + ".safetensors"
        )
        return make_file_response(file, name)
    if (
        path in GROWING_FILES
    ):  # what is added while it is sent would exceed the length that was told
        return Response(file.read_bytes(), media_type="text/plain; charset=utf-8")
    return make_file_response(file)


@router.get("/runs/{id}/log")
def get_log(
    id: str,
    home: ServicesDep,
    since: int = -65536,
    limit: Annotated[int, Query(ge=16, le=1 << 20)] = 65536,
) -> LogPart:
    """train.log from byte `since` on; negative: so many bytes before its end."""
    return log_reader.read_log_part(get_run_folder(home, id) / "train.log", since, limit)


@router.put("/runs/{id}/checkpoints/{name}/mark")
def mark_checkpoint(id: str, name: str, body: MarkRequest, home: ServicesDep) -> RunDetail:
    """A marked checkpoint is never removed by the training."""
    stored.mark_checkpoint(home.workspace, get_run_folder(home, id), name, body.marked)
    return home.runs.detail(id)


@router.websocket("/live")
async def stream_live(socket: WebSocket, home: ServicesDep) -> None:
    """Hears Follow, tells Live."""
    await socket.accept()
    if home.broadcaster.is_full:
        await socket.close(CLOSE_TRY_AGAIN, "too many pages are open")
        return
    listener = Subscriber()
    telling = asyncio.create_task(home.broadcaster.stream_to(listener, socket.send_text))
    hearing = asyncio.create_task(receive_follow_requests(socket, listener))
    both = (telling, hearing)
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in both:
            task.cancel()
        await asyncio.wait(both)
    failures = [task.exception() for task in both if not task.cancelled()]
    for failure in failures:
        if isinstance(failure, SlowSubscriber):
            await socket.close(CLOSE_TRY_AGAIN, "too slow")
        elif isinstance(failure, ValidationError):
            await socket.close(CLOSE_POLICY_VIOLATION, "not a Follow")
        elif failure is not None and not isinstance(failure, WebSocketDisconnect):
            raise failure


async def receive_follow_requests(socket: WebSocket, listener: Subscriber) -> None:
    """Until the other side leaves. Raises ValidationError at what is no Follow."""
    while (message := await socket.receive())["type"] != "websocket.disconnect":
        listener.follow = FollowRequest.model_validate_json(message.get("text") or "")
