"""One watcher of files for all who listen; each is sent what is new to it, and nothing twice.

What a listener has been sent is two version numbers and two byte offsets, so that nothing queues up for it:
whoever reads slowly gets the newest list when he comes to it, and who does not read at all is dropped.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from pydantic import TypeAdapter

from simpletuner.server import tail
from simpletuner.server.runs import Runs
from simpletuner.server.wire.jobs import Queue
from simpletuner.server.wire.live import Follow
from simpletuner.server.wire.runs import RunSummary

EVERY_S = 0.25
LIST_EVERY_S = 1.0
SEND_S = 15.0  # a message that is not taken by then drops its listener
RECORDS = 2000  # of a message
LOG_BYTES = 65536
NULL = "null"
NO_PART = MappingProxyType({"run": NULL, "events": "[]", "start": NULL, "end": NULL, "log": NULL})
RUNS = TypeAdapter(list[RunSummary])

Send = Callable[[str], Awaitable[None]]


class Slow(Exception):
    """A listener that does not take what it is sent."""


@dataclass(eq=False)
class Listener:
    """follow: with the offsets up to which it was sent. versions: of the list of runs and of the queue."""

    follow: Follow = field(default_factory=Follow)
    versions: tuple[int, int] = (0, 0)
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def wants(self, follow: Follow) -> None:
        self.follow = follow
        self.woken.set()


@dataclass(frozen=True)
class Board:
    """The lists as JSON, each with its version."""

    runs: str = NULL
    queue: str = NULL
    versions: tuple[int, int] = (0, 0)

    def changed(self, runs: str, queue: str) -> Board:
        first, second = self.versions
        return Board(runs, queue, (first + (runs != self.runs), second + (queue != self.queue)))


class Watcher:
    """queue: Jobs.queue. most: how many may listen at once."""

    def __init__(
        self, runs: Runs, queue: Callable[[], Queue], most: int = 64, send_s: float = SEND_S
    ) -> None:
        self._runs, self._queue, self._most, self._send_s = runs, queue, most, send_s
        self._listeners: set[Listener] = set()
        self._task: asyncio.Task[None] | None = None
        self._board = Board()
        self._list_due = 0.0
        self._sizes: dict[str, tuple[int, ...]] = {}

    @property
    def full(self) -> bool:
        return len(self._listeners) >= self._most

    async def tell(self, listener: Listener, send: Send) -> None:
        """Send until cancelled. Raises Slow, and whatever made the watcher fail."""
        self._listeners.add(listener)
        if self._task is None or self._task.done():
            self._board, self._list_due = Board(), 0.0
            self._task = asyncio.create_task(self._watch())
            self._task.add_done_callback(lambda _: self._wake())
        watching = self._task
        try:
            while True:
                follow = listener.follow
                news, behind = await asyncio.to_thread(self._news, listener, follow)
                if listener.follow is follow:  # else it has turned to another run meanwhile
                    listener.follow = behind
                if news is not None:
                    await self._send(send, news)
                    continue
                await listener.woken.wait()
                listener.woken.clear()
                if watching.done():
                    watching.result()
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                watching.cancel()

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

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.woken.set()

    async def _watch(self) -> None:
        while True:
            followed = {one.follow.run for one in self._listeners if one.follow.run is not None}
            if await asyncio.to_thread(self._look, followed):
                self._wake()
            await asyncio.sleep(EVERY_S)

    def _look(self, followed: set[str]) -> bool:
        """Whether a followed run's files have changed, or a list; makes the lists anew when it is time."""
        board, sizes = self._board, {run: self._size(run) for run in followed}
        if time.monotonic() >= self._list_due:
            runs = RUNS.dump_json(self._runs.summaries()).decode()
            self._board = board.changed(runs, self._queue().model_dump_json())
            self._list_due = time.monotonic() + LIST_EVERY_S
        before, self._sizes = self._sizes, sizes
        return sizes != before or self._board.versions != board.versions

    def _size(self, run: str) -> tuple[int, ...]:
        folder = self._runs.find(run)
        return () if folder is None else (_bytes(folder / "events.jsonl"), _bytes(folder / "train.log"))

    def _news(self, listener: Listener, follow: Follow) -> tuple[str | None, Follow]:
        """The next message, None when there is nothing to tell, and the offsets behind it."""
        board, known = self._board, listener.versions
        listener.versions = board.versions
        lists = {
            "runs": board.runs if board.versions[0] != known[0] else NULL,
            "queue": board.queue if board.versions[1] != known[1] else NULL,
        }
        part, behind = self._part(follow)
        if not part and board.versions == known:
            return None, follow
        message = {**lists, **(part or NO_PART)}
        return "{" + ",".join(f'"{name}":{value}' for name, value in message.items()) + "}", behind

    def _part(self, follow: Follow) -> tuple[dict[str, str], Follow]:
        """What is new of the followed run, as JSON."""
        folder = self._runs.find(follow.run) if follow.run is not None else None
        if folder is None:
            return {}, follow
        events = tail.lines(folder / "events.jsonl", follow.since, RECORDS)
        log = tail.text(folder / "train.log", follow.log_since, LOG_BYTES)
        if events.end == follow.since and log.end == follow.log_since:
            return {}, follow
        records = [found for line in events.lines if (found := tail.record(line)) is not None]
        part = {
            "run": json.dumps(follow.run),
            "events": json.dumps(records),
            "start": str(events.start),
            "end": str(events.end),
            "log": log.model_dump_json() if log.end != follow.log_since else NULL,
        }
        return part, follow.model_copy(update={"since": events.end, "log_since": log.end})


def _bytes(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
