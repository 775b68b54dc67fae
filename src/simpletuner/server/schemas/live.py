"""What goes over the WebSocket."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from simpletuner.server.schemas.base import ApiModel
from simpletuner.server.schemas.jobs import Queue
from simpletuner.server.schemas.runs import LogPart, RunSummary


class FollowRequest(ApiModel):
    """From client to server: which run to follow, from which byte of its events and of its log. run None:
    only the list.
    """

    run: str | None = None
    since: int = 0
    log_since: int = 0


class LiveUpdate(ApiModel):
    """From server to client. runs: the whole list, sent when it changed. queue likewise. events: records as
    in events.jsonl (t, kind, fields) of the followed run, start..end: their bytes; start 0 though the client
    asked for more: the run was begun anew, what came before is void. log: its next part.
    """

    runs: list[RunSummary] | None = None
    queue: Queue | None = None
    run: str | None = None
    events: list[dict[str, Any]] = Field(default_factory=list)
    start: int | None = None
    end: int | None = None
    log: LogPart | None = None
