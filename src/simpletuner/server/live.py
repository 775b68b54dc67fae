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

from simpletuner.server import tail
from simpletuner.server.runs import Runs
from simpletuner.server.wire.jobs import Queue
from simpletuner.server.wire.live import Follow, Live
from simpletuner.server.wire.runs import RunSummary

EVERY_S = 0.25
LIST_EVERY_S = 1.0
SEND_S = 15.0  # a message that is not taken by then drops its listener
RECORDS = 2000  # of a message
LOG_BYTES = 65536

Send = Callable[[str], Awaitable[None]]


class Slow(Exception):
    """A listener that does not take what it is sent."""


@dataclass(eq=False)
class Listener:
    """follow: with the offsets up to which it was sent. versions: of the list of runs and of the queue."""

    follow: Follow = field(default_factory=Follow)
    versions: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Board:
    """The lists, and how often each has changed."""

    runs: list[RunSummary]
    queue: Queue
    versions: tuple[int, int] = (1, 1)


class Watcher:
    """queue: Jobs.queue. most: how many may listen at once. The lists are made once for all of them."""

    def __init__(
        self, runs: Runs, queue: Callable[[], Queue], most: int = 64, send_s: float = SEND_S
    ) -> None:
        self._runs, self._queue, self._most, self._send_s = runs, queue, most, send_s
        self._listeners: set[Listener] = set()
        self._board: Board | None = None
        self._list_due = 0.0
        self._lock = threading.Lock()

    @property
    def full(self) -> bool:
        return len(self._listeners) >= self._most

    async def tell(self, listener: Listener, send: Send) -> None:
        """Send until cancelled. Raises Slow, and whatever made the lists fail."""
        self._listeners.add(listener)
        try:
            while True:
                follow = listener.follow
                news, behind = await asyncio.to_thread(self._news, listener, follow)
                if listener.follow is follow:  # else it has turned to another run meanwhile
                    listener.follow = behind
                if news is None:
                    await asyncio.sleep(EVERY_S)
                else:
                    await self._send(send, news.model_dump_json())
        finally:
            self._listeners.discard(listener)

    async def _send(self, send: Send, news: str) -> None:
        """Not by wait_for: before Python 3.12 it may swallow a cancellation, and would tell for ever."""
        sending = asyncio.ensure_future(send(news))
        try:
            done, _ = await asyncio.wait({sending}, timeout=self._send_s)
        finally:
            sending.cancel()
        if not done:
            raise Slow
        sending.result()

    def _lists(self) -> Board:
        with self._lock:
            board = self._board
            if board is None or time.monotonic() >= self._list_due:
                runs, queue = self._runs.summaries(), self._queue()
                if board is None:
                    board = Board(runs, queue)
                else:
                    first, second = board.versions
                    versions = (first + (runs != board.runs), second + (queue != board.queue))
                    board = Board(runs, queue, versions)
                self._board, self._list_due = board, time.monotonic() + LIST_EVERY_S
            return board

    def _news(self, listener: Listener, follow: Follow) -> tuple[Live | None, Follow]:
        """The next message, None when there is nothing to tell, and the offsets behind it."""
        board, known = self._lists(), listener.versions
        listener.versions = board.versions
        lists: dict[str, Any] = {
            "runs": board.runs if board.versions[0] != known[0] else None,
            "queue": board.queue if board.versions[1] != known[1] else None,
        }
        part, behind = self._part(follow)
        return (Live(**lists, **part) if part or board.versions != known else None), behind

    def _part(self, follow: Follow) -> tuple[dict[str, Any], Follow]:
        """What is new of the followed run."""
        folder = self._runs.find(follow.run) if follow.run is not None else None
        if folder is None:
            return {}, follow
        events = tail.lines(folder / "events.jsonl", follow.since, RECORDS)
        log = tail.text(folder / "train.log", follow.log_since, LOG_BYTES)
        if events.end == follow.since and log.end == follow.log_since:
            return {}, follow
        records = [found for line in events.lines if (found := tail.record(line)) is not None]
        new_log = log if log.end != follow.log_since else None
        part = {
            "run": follow.run, "events": records, "start": events.start, "end": events.end, "log": new_log
        }  # fmt: skip
        return part, follow.model_copy(update={"since": events.end, "log_since": log.end})
