"""Live updates for all connected pages; each subscriber receives only what is new to it.

What a subscriber has received is described by two version numbers and two byte offsets, so no
messages queue up: a slow subscriber receives all later changes at once when it is ready, and one
that does not read is disconnected. The first message has the runs that have not ended, the next
ones only those that changed: the list of a thousand ended runs is read in pages, not sent to each.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from simpletuner.server.job_states import ENDED_STATES
from simpletuner.server.run_service import RunService
from simpletuner.server.schemas.jobs import Queue
from simpletuner.server.schemas.live import FollowRequest, LiveUpdate
from simpletuner.server.schemas.runs import RunSummary

POLL_INTERVAL_S = 0.25
LIST_INTERVAL_S = 1.0
SEND_TIMEOUT_S = 15.0  # a subscriber that takes longer to receive a message is disconnected
MAX_RECORDS = 2000  # events per message
MAX_LOG_BYTES = 65536

SendText = Callable[[str], Awaitable[None]]


class SlowSubscriber(Exception):
    """A subscriber did not receive a message in time."""


@dataclass(eq=False)
class Subscriber:
    """One connected page.

    follow: the run it follows, with the offsets up to which it has received the events and the log.
    sent_versions: the versions of the list of runs and of the queue that it has received. sent_run:
    the followed run whose summary it has received. sent_preview: the version of its preview that
    it knows of.
    """

    follow: FollowRequest = field(default_factory=FollowRequest)
    sent_versions: tuple[int, int] = (0, 0)
    sent_run: str | None = None
    sent_preview: int | None = None


LABELS = ("name", "tags", "note", "archived")  # fields of RunSummary that a user changes


@dataclass(frozen=True)
class ListSnapshot:
    """The list of runs and the queue.

    versions: how often each has changed. changed_at, removed_at: the version of the list at which a
    run changed last, and at which it was removed. unread: runs whose events are still being read
    for the first time.
    """

    runs: list[RunSummary]
    queue: Queue
    versions: tuple[int, int] = (1, 1)
    changed_at: Mapping[str, int] = field(default_factory=dict)
    removed_at: Mapping[str, int] = field(default_factory=dict)
    unread: Set[str] = frozenset()

    def update(
        self, runs: list[RunSummary], queue: Queue, unread: Set[str] = frozenset()
    ) -> ListSnapshot:
        """Return the next snapshot.

        A run that has ended does not count as changed while it is read for the first time, unless
        a user has changed it: otherwise a server that starts with a thousand runs would send them
        all.
        """
        runs_version, queue_version = self.versions
        before = {run.id: run for run in self.runs}
        now = {run.id: run for run in runs}
        changed = [
            id
            for id, run in now.items()
            if run is not before.get(id)  # an equal object is compared more slowly
            and run != before.get(id)
            and not (id in self.unread and is_same_ended_run(before[id], run))
        ]
        removed = before.keys() - now.keys()
        runs_version += bool(changed or removed)
        changed_at = {id: self.changed_at.get(id, 1) for id in now}
        changed_at |= dict.fromkeys(changed, runs_version)
        removed_at = {id: at for id, at in self.removed_at.items() if id not in now}
        removed_at |= dict.fromkeys(removed, runs_version)
        versions = (runs_version, queue_version + (queue != self.queue))
        return ListSnapshot(runs, queue, versions, changed_at, removed_at, unread)

    def list_fields(self, sent: int, newly_followed: str | None) -> dict[str, Any]:
        """Return the fields of LiveUpdate about the list, after version `sent` of it.

        newly_followed: a run whose summary is sent in any case.
        """
        if sent == self.versions[0] and newly_followed is None:
            return {}
        fields: dict[str, Any] = {}
        if sent == 0:
            fields["runs"] = [run for run in self.runs if run.state not in ENDED_STATES]
        changed = [
            run
            for run in self.runs
            if run.id == newly_followed or (sent and self.changed_at.get(run.id, 1) > sent)
        ]
        removed = [id for id, at in self.removed_at.items() if sent and at > sent]
        return fields | {
            name: rows for name, rows in (("changed", changed), ("removed", removed)) if rows
        }


def is_same_ended_run(before: RunSummary, now: RunSummary) -> bool:
    """Return whether a run has ended in both and differs only by what its events say."""
    if before.state not in ENDED_STATES:
        return False
    return all(getattr(before, name) == getattr(now, name) for name in ("state", *LABELS))


class LiveBroadcaster:
    """Sends live updates; the lists are computed once for all subscribers.

    queue: returns the current queue. max_subscribers: limit of simultaneous connections.
    """

    def __init__(
        self,
        runs: RunService,
        queue: Callable[[], Queue],
        max_subscribers: int = 64,
        send_timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        self._runs = runs
        self._queue = queue
        self._max_subscribers = max_subscribers
        self._send_timeout_s = send_timeout_s
        self._subscribers: set[Subscriber] = set()
        self._snapshot: ListSnapshot | None = None
        self._list_due = 0.0
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        return len(self._subscribers) >= self._max_subscribers

    async def stream_to(self, subscriber: Subscriber, send: SendText) -> None:
        """Send updates until cancelled.

        Raises SlowSubscriber, and any error of reading the lists.
        """
        self._subscribers.add(subscriber)
        try:
            while True:
                follow = subscriber.follow
                update, next_follow = await asyncio.to_thread(
                    self._next_message, subscriber, follow
                )
                if subscriber.follow is follow:  # otherwise it now follows another run
                    subscriber.follow = next_follow
                if update is None:
                    await asyncio.sleep(POLL_INTERVAL_S)
                else:
                    await self._send_message(send, update.model_dump_json())
        finally:
            self._subscribers.discard(subscriber)

    async def _send_message(self, send: SendText, text: str) -> None:
        """Send a message. Raises SlowSubscriber if that takes longer than the timeout.

        asyncio.wait_for is not used: before Python 3.12 it can lose a cancellation, and the loop
        would not end.
        """
        sending = asyncio.ensure_future(send(text))
        try:
            done, _ = await asyncio.wait({sending}, timeout=self._send_timeout_s)
        finally:
            sending.cancel()
        if not done:
            raise SlowSubscriber
        sending.result()

    def _list_snapshot(self) -> ListSnapshot:
        with self._lock:
            snapshot = self._snapshot
            if snapshot is None or time.monotonic() >= self._list_due:
                (runs, unread), queue = self._runs.summaries_and_unread(), self._queue()
                if snapshot is None:
                    snapshot = ListSnapshot(runs, queue, unread=unread)
                else:
                    snapshot = snapshot.update(runs, queue, unread)
                self._snapshot = snapshot
                self._list_due = time.monotonic() + LIST_INTERVAL_S
            return snapshot

    def _next_message(
        self, subscriber: Subscriber, follow: FollowRequest
    ) -> tuple[LiveUpdate | None, FollowRequest]:
        """Return the next message or None, and the request with the offsets after it."""
        snapshot = self._list_snapshot()
        sent = subscriber.sent_versions
        subscriber.sent_versions = snapshot.versions
        newly_followed = follow.run if follow.run != subscriber.sent_run else None
        if follow.run != subscriber.sent_run:
            subscriber.sent_preview = None
        subscriber.sent_run = follow.run
        run_fields, next_follow = self._run_update(subscriber, follow)
        fields = {**snapshot.list_fields(sent[0], newly_followed), **run_fields}
        if snapshot.versions[1] != sent[1]:
            fields["queue"] = snapshot.queue
        if not fields:
            return None, next_follow
        update = LiveUpdate(**fields)
        return update, next_follow

    def _run_update(
        self, subscriber: Subscriber, follow: FollowRequest
    ) -> tuple[dict[str, Any], FollowRequest]:
        """Return the fields of LiveUpdate for the followed run, {} if nothing is new."""
        reader = self._runs.find_reader(follow.run) if follow.run is not None else None
        if reader is None:
            return {}, follow
        records, start, end = reader.events(follow.since, MAX_RECORDS)
        log = reader.log(follow.log_since, MAX_LOG_BYTES)
        preview = reader.preview_version()
        is_same_preview = preview == subscriber.sent_preview
        subscriber.sent_preview = preview
        if end == follow.since and log.end == follow.log_since and is_same_preview:
            return {}, follow
        fields = {
            "run": follow.run,
            "events": records,
            "start": start,
            "end": end,
            "log": log if log.end != follow.log_since else None,
            "preview": preview,
        }
        return fields, follow.model_copy(update={"since": end, "log_since": log.end})
