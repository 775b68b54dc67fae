"""What has changed, told to all who listen; each is sent what is new to it, and nothing twice.

What a listener has been sent is two version numbers and two byte offsets, so that nothing queues up for it:
whoever reads slowly gets the newest list when he comes to it, and who does not read at all is dropped.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from simpletuner.server import log_reader
from simpletuner.server.run_service import RunService
from simpletuner.server.schemas.jobs import Queue
from simpletuner.server.schemas.live import FollowRequest, LiveUpdate
from simpletuner.server.schemas.runs import RunSummary

POLL_INTERVAL_S = 0.25
LIST_INTERVAL_S = 1.0
SEND_TIMEOUT_S = 15.0  # a message that is not taken by then drops its listener
MAX_RECORDS = 2000  # of a message
MAX_LOG_BYTES = 65536

SendText = Callable[[str], Awaitable[None]]


class SlowSubscriber(Exception):
    """A listener that does not take what it is sent."""


@dataclass(eq=False)
class Subscriber:
    """follow: with the offsets up to which it was sent. versions: of the list of runs and of the queue."""

    follow: FollowRequest = field(default_factory=FollowRequest)
    sent_versions: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ListSnapshot:
    """The lists, and how often each has changed."""

    runs: list[RunSummary]
    queue: Queue
    versions: tuple[int, int] = (1, 1)


class LiveBroadcaster:
    """queue: Jobs.queue. most: how many may listen at once. The lists are made once for all of them."""

    def __init__(
        self,
        runs: RunService,
        queue: Callable[[], Queue],
        most: int = 64,
        send_s: float = SEND_TIMEOUT_S,
    ) -> None:
        self._runs, self._queue, self._max_subscribers, self._send_timeout_s = (
            runs,
            queue,
            most,
            send_s,
        )
        self._subscribers: set[Subscriber] = set()
        self._snapshot: ListSnapshot | None = None
        self._list_due = 0.0
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        return len(self._subscribers) >= self._max_subscribers

    async def stream_to(self, listener: Subscriber, send: SendText) -> None:
        """Send until cancelled. Raises Slow, and whatever made the lists fail."""
        self._subscribers.add(listener)
        try:
            while True:
                follow = listener.follow
                news, behind = await asyncio.to_thread(self._next_message, listener, follow)
                if listener.follow is follow:  # else it has turned to another run meanwhile
                    listener.follow = behind
                if news is None:
                    await asyncio.sleep(POLL_INTERVAL_S)
                else:
                    await self._send_message(send, news.model_dump_json())
        finally:
            self._subscribers.discard(listener)

    async def _send_message(self, send: SendText, news: str) -> None:
        """Not by wait_for: before Python 3.12 it may swallow a cancellation, and would tell for ever."""
        sending = asyncio.ensure_future(send(news))
        try:
            done, _ = await asyncio.wait({sending}, timeout=self._send_timeout_s)
        finally:
            sending.cancel()
        if not done:
            raise SlowSubscriber
        sending.result()

    def _list_snapshot(self) -> ListSnapshot:
        with self._lock:
            board = self._snapshot
            if board is None or time.monotonic() >= self._list_due:
                runs, queue = self._runs.summaries(), self._queue()
                if board is None:
                    board = ListSnapshot(runs, queue)
                else:
                    first, second = board.versions
                    versions = (first + (runs != board.runs), second + (queue != board.queue))
                    board = ListSnapshot(runs, queue, versions)
                self._snapshot, self._list_due = board, time.monotonic() + LIST_INTERVAL_S
            return board

    def _next_message(
        self, listener: Subscriber, follow: FollowRequest
    ) -> tuple[LiveUpdate | None, FollowRequest]:
        """The next message, None when there is nothing to tell, and the offsets behind it."""
        board, known = self._list_snapshot(), listener.sent_versions
        listener.sent_versions = board.versions
        lists: dict[str, Any] = {
            "runs": board.runs if board.versions[0] != known[0] else None,
            "queue": board.queue if board.versions[1] != known[1] else None,
        }
        part, behind = self._run_update(follow)
        return (LiveUpdate(**lists, **part) if part or board.versions != known else None), behind

    def _run_update(self, follow: FollowRequest) -> tuple[dict[str, Any], FollowRequest]:
        """What is new of the followed run."""
        folder = self._runs.find_folder(follow.run) if follow.run is not None else None
        if folder is None:
            return {}, follow
        events = log_reader.read_lines(folder / "events.jsonl", follow.since, MAX_RECORDS)
        log = log_reader.read_log_part(folder / "train.log", follow.log_since, MAX_LOG_BYTES)
        if events.end == follow.since and log.end == follow.log_since:
            return {}, follow
        records = [
            found for line in events.lines if (found := log_reader.parse_record(line)) is not None
        ]
        new_log = log if log.end != follow.log_since else None
        part = {
            "run": follow.run,
            "events": records,
            "start": events.start,
            "end": events.end,
            "log": new_log,
        }
        return part, follow.model_copy(update={"since": events.end, "log_since": log.end})
