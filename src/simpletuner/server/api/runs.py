"""Routes for runs: summaries, metrics, files, the log, and the live WebSocket."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Response, WebSocket
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.websockets import WebSocketDisconnect

from simpletuner.server import run_artifacts
from simpletuner.server.file_reader import replace_surrogates
from simpletuner.server.file_responses import make_file_response
from simpletuner.server.live_broadcaster import SlowSubscriber, Subscriber
from simpletuner.server.log_search import search_log
from simpletuner.server.run_pages import select_page
from simpletuner.server.run_prompts import read_run_prompts, write_run_prompts
from simpletuner.server.run_reader import RunReader
from simpletuner.server.sampling_previews import RUN_PREVIEW_FILE, make_preview_response
from simpletuner.server.schemas.live import FollowRequest
from simpletuner.server.schemas.runs import (
    LogMatches,
    LogPart,
    MarkRequest,
    RunDetail,
    RunImage,
    RunMetrics,
    RunPage,
    RunPrompts,
    RunPromptsWrite,
    RunQuery,
    RunTables,
)
from simpletuner.server.services import Services, ServicesDep
from simpletuner.server.thumbnails import get_thumbnail

CLOSE_TRY_AGAIN = 1013  # "Try Again Later" in the WebSocket close code registry
CLOSE_POLICY_VIOLATION = 1008
GROWING_FILES = ("events.jsonl", "train.log")

router = APIRouter(prefix="/api/v1", tags=["runs"])


def get_reader(services: Services, id: str) -> RunReader:
    """Return the reader of a run's folder; while the run has no folder yet, it reads /dev/null.

    Raises ApiError 404 for an unknown run id.
    """
    reader = services.runs.find_reader(id)
    if reader is None:
        services.runs.summary(id)
    return reader or RunReader(Path(os.devnull))


@router.get("/runs")
def list_runs(query: Annotated[RunQuery, Query()], services: ServicesDep) -> RunPage:
    """Return a page of the list of runs."""
    runs, unread = services.runs.summaries_and_unread()
    return select_page(runs, query, unread)


@router.get("/runs/{id}")
def get_run(id: str, services: ServicesDep) -> RunDetail:
    """Return the details of a run."""
    return services.runs.detail(id)


@router.get("/runs/{id}/metrics")
def get_metrics(
    id: str, services: ServicesDep, max_points: Annotated[int, Query(ge=4, le=100_000)] = 2000
) -> RunMetrics:
    """Return the metrics of a run as columns."""
    return get_reader(services, id).metrics(max_points)


@router.get("/runs/{id}/tables")
def get_tables(id: str, services: ServicesDep) -> RunTables:
    """Return the epochs of a run and its held-out losses as tables."""
    return get_reader(services, id).tables()


@router.get("/runs/{id}/pictures")
def list_images(id: str, services: ServicesDep) -> list[RunImage]:
    """Return the validation images of a run."""
    return services.runs.list_images(id)


@router.get("/runs/{id}/preview", response_class=Response)
def get_run_preview(id: str, services: ServicesDep) -> Response:
    """Return the rough preview of the validation images that are being sampled, a JPEG."""
    folder = get_reader(services, id).path
    return make_preview_response(services.workspace.resolve_below(folder, RUN_PREVIEW_FILE))


@router.get("/runs/{id}/prompts")
def get_run_prompts(id: str, services: ServicesDep) -> RunPrompts:
    """Return the validation prompts of a run."""
    state = services.runs.summary(id).state
    return read_run_prompts(services.workspace, get_reader(services, id), state)


@router.put("/runs/{id}/prompts")
def edit_run_prompts(id: str, body: RunPromptsWrite, services: ServicesDep) -> RunPrompts:
    """Replace the validation prompts of a run that trains, from its next validation on."""
    state = services.runs.summary(id).state
    return write_run_prompts(services.workspace, get_reader(services, id), state, body.prompts)


@router.get("/runs/{id}/files/{path:path}", response_class=FileResponse)
def get_run_file(
    id: str,
    path: str,
    services: ServicesDep,
    width: Annotated[int | None, Query(ge=1, le=4096)] = None,
) -> Response:
    """Return a file of the run folder, or a JPEG thumbnail about `width` pixels wide.

    The name of a checkpoint returns its LoRA file. A LoRA is downloaded under the run's name.
    """
    folder = get_reader(services, id).path
    file = run_artifacts.resolve_artifact(services.workspace, folder, path)
    if width is not None:
        return Response(
            get_thumbnail(file, width, services.workspace.server_dir / "thumbs"),
            media_type="image/jpeg",
        )
    if file.name == run_artifacts.LORA_FILE:
        where = path.removesuffix(run_artifacts.LORA_FILE).strip("/").replace("/", "-")
        name = (
            "-".join(part for part in (replace_surrogates(folder.name), where) if part)
            + ".safetensors"
        )
        return make_file_response(file, name)
    if path in GROWING_FILES:
        # Read whole: bytes appended while it is sent would exceed the Content-Length.
        return Response(file.read_bytes(), media_type="text/plain; charset=utf-8")
    return make_file_response(file)


@router.get("/runs/{id}/log")
def get_log(
    id: str,
    services: ServicesDep,
    since: int = -65536,
    limit: Annotated[int, Query(ge=16, le=1 << 20)] = 65536,
) -> LogPart:
    """Return train.log from byte `since`; a negative value counts back from the end of the file."""
    return get_reader(services, id).log(since, limit)


@router.get("/runs/{id}/log/matches")
def find_in_log(
    id: str,
    services: ServicesDep,
    text: Annotated[str, Query(min_length=1, max_length=200)],
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> LogMatches:
    """Return the lines of train.log that contain a text, upper or lower case."""
    return search_log(get_reader(services, id).path / "train.log", text, limit)


@router.put("/runs/{id}/checkpoints/{name}/mark")
def mark_checkpoint(id: str, name: str, body: MarkRequest, services: ServicesDep) -> RunDetail:
    """Mark or unmark a checkpoint; training never deletes a marked one."""
    run_artifacts.mark_checkpoint(
        services.workspace, get_reader(services, id).path, name, body.marked
    )
    return services.runs.detail(id)


@router.websocket("/live")
async def stream_live(socket: WebSocket, services: ServicesDep) -> None:
    """Receive FollowRequest messages and send LiveUpdate messages until either side closes."""
    await socket.accept()
    if services.broadcaster.is_full:
        await socket.close(CLOSE_TRY_AGAIN, "too many live connections are open")
        return
    subscriber = Subscriber()
    sending = asyncio.create_task(services.broadcaster.stream_to(subscriber, socket.send_text))
    receiving = asyncio.create_task(receive_follow_requests(socket, subscriber))
    tasks = (sending, receiving)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    failures = [task.exception() for task in tasks if not task.cancelled()]
    for failure in failures:
        if isinstance(failure, SlowSubscriber):
            await socket.close(CLOSE_TRY_AGAIN, "the client reads too slowly")
        elif isinstance(failure, ValidationError):
            await socket.close(CLOSE_POLICY_VIOLATION, "the message is not a FollowRequest")
        elif failure is not None and not isinstance(failure, WebSocketDisconnect):
            raise failure


async def receive_follow_requests(socket: WebSocket, subscriber: Subscriber) -> None:
    """Update the subscription with each message until the client disconnects.

    Raises ValidationError for a message that is not a FollowRequest.
    """
    while (message := await socket.receive())["type"] != "websocket.disconnect":
        subscriber.follow = FollowRequest.model_validate_json(message.get("text") or "")
