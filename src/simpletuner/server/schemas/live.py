"""Messages of the live WebSocket."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from simpletuner.server.schemas.base import ApiModel
from simpletuner.server.schemas.jobs import Queue
from simpletuner.server.schemas.runs import LogPart, RunSummary


class FollowRequest(ApiModel):
    """A client's request to follow a run.

    run: id of the run, None for the list of runs only. since, log_since: byte offsets in
    events.jsonl and train.log to start from.
    """

    run: str | None = None
    since: int = 0
    log_since: int = 0


class LiveUpdate(ApiModel):
    """An update from the server.

    runs: the runs that have not ended, in the first message only; the whole list is read in pages.
    changed: runs that are new or changed since the last message, and the run that is followed from
    now on. removed: ids of runs that are gone. queue: the queue, sent when it changed.
    events: new records of the followed run, as in events.jsonl (t, kind, fields). start, end: their
    byte offsets; a start of 0 after a request for a later offset means that the run was started
    from scratch and earlier events are void. log: the next part of the log. preview: changes with
    the rough preview of images that are being sampled, None without one; it is in every message
    about the followed run.
    """

    runs: list[RunSummary] | None = None
    changed: list[RunSummary] = Field(default_factory=list)
    removed: list[str] = Field(default_factory=list)
    queue: Queue | None = None
    run: str | None = None
    events: list[dict[str, Any]] = Field(default_factory=list)
    start: int | None = None
    end: int | None = None
    log: LogPart | None = None
    preview: int | None = None
