"""The live connection: each update once, resumed after a break, and slow clients are dropped."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketTestSession
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from simpletuner.server import live_broadcaster, run_finder, run_service
from simpletuner.server.run_service import RunService
from simpletuner.server.schemas.jobs import Queue
from simpletuner.server.schemas.live import FollowRequest, LiveUpdate
from simpletuner.server.schemas.runs import RunSummary
from simpletuner.server.workspace import Workspace, run_id
from tests.server.run_folder_writer import RunFolderWriter, empty_queue, make_runs_app
from tests.server.test_run_pages import make_run

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_broadcaster, "POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr(live_broadcaster, "LIST_INTERVAL_S", 0.02)
    monkeypatch.setattr(run_finder, "RESCAN_INTERVAL_S", 0.0)


def until(enough: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not enough():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def code_at_the_end(page: WebSocketTestSession) -> int:
    try:
        while True:
            page.receive_json()
    except WebSocketDisconnect as ended:
        return ended.code


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """A real server on a free port; the address of its live connection."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            app, log_level="error", ws_ping_interval=None, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield f"ws://127.0.0.1:{listening.getsockname()[1]}/api/v1/live"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


class Page:
    """A client that keeps what it was told, as the pages do."""

    def __init__(
        self, connection: ClientConnection, run: str, since: int = 0, log_since: int = 0
    ) -> None:
        self.connection = connection
        self.events: list[dict[str, Any]] = []
        self.log, self.messages = "", []
        self.since, self.log_since = since, log_since
        connection.send(json.dumps({"run": run, "since": since, "log_since": log_since}))

    def hear(self, patience_s: float = PATIENCE_S) -> LiveUpdate:
        message = LiveUpdate.model_validate_json(self.connection.recv(patience_s))
        self.messages.append(message)
        if message.end is not None:
            assert message.start in (self.since, 0)
            self.events = message.events if message.start == 0 else self.events + message.events
            self.since = message.end
        if message.log is not None:
            self.log = message.log.text if message.log.start == 0 else self.log + message.log.text
            self.log_since = message.log.end
        return message

    def rest(self, quiet_s: float = 0.5) -> None:
        """Hear until nothing comes any more."""
        for _ in range(100):
            try:
                self.hear(quiet_s)
            except TimeoutError:
                return
        pytest.fail("it never rests")

    def until(self, enough: Callable[[Page], object]) -> Page:
        deadline = time.monotonic() + PATIENCE_S
        while not enough(self):
            assert time.monotonic() < deadline
            self.hear()
        return self

    @property
    def steps(self) -> list[int]:
        return [event["step"] for event in self.events if event["kind"] == "step"]


def test_first_what_has_not_ended_and_then_only_what_changes(tmp_path: Path) -> None:
    RunFolderWriter(tmp_path / "ended").write_start().write_exit()
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 3)
    with (
        run.hold_lock(),
        serving(make_runs_app(tmp_path)) as address,
        connect(address) as connection,
    ):
        page = Page(connection, "0" * 12)
        first = page.hear()
        assert first.runs is not None
        assert first.queue == empty_queue()
        assert [(one.name, one.step) for one in first.runs] == [("run", 3)]
        connection.send(FollowRequest(run=run_id(run.path)).model_dump_json())
        page.until(lambda page: page.steps == [1, 2, 3])
        page.rest()
        heard = len(page.messages)
        run.write_steps(4, 4)
        (run.path / "train.log").write_text("a line\n")
        page.until(lambda page: page.steps == [1, 2, 3, 4] and page.log == "a line\n")
        page.until(lambda page: any(message.changed for message in page.messages[heard:]))
        assert all(message.runs is None for message in page.messages[heard:])
        assert all(message.queue is None for message in page.messages[heard:])
        connection.send(FollowRequest().model_dump_json())
        page.rest()
        run.write_steps(5, 5)
        assert page.hear().run is None


def test_a_run_that_has_ended_is_sent_when_it_is_followed(tmp_path: Path) -> None:
    """A page that was without a connection while its run ended learns of the end."""
    run = RunFolderWriter(tmp_path / "run").write_start()
    run.write_exit(message="it ended")
    with serving(make_runs_app(tmp_path)) as address, connect(address) as connection:
        page = Page(connection, "0" * 12)
        assert page.hear().runs == []
        connection.send(FollowRequest(run=run_id(run.path)).model_dump_json())
        page.until(lambda page: page.messages[-1].changed)
        page.rest()
    sent = [(one.state, one.message) for message in page.messages for one in message.changed]
    assert sent == [("done", "it ended")]


def test_eight_pages_at_once(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    heard: list[list[int]] = []

    def look(address: str) -> None:
        with connect(address) as connection:
            heard.append(
                Page(connection, run_id(run.path)).until(lambda page: 50 in page.steps).steps
            )

    with serving(make_runs_app(tmp_path)) as address:
        pages = [threading.Thread(target=look, args=(address,)) for _ in range(8)]
        for page in pages:
            page.start()
        for step in range(1, 51):
            run.write_steps(step, step)
            time.sleep(0.005)
        for page in pages:
            page.join(PATIENCE_S)
    assert heard == [list(range(1, 51))] * 8


def test_a_page_goes_on_after_the_server_was_started_again(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 10)
    (run.path / "train.log").write_text("one\n")
    with serving(make_runs_app(tmp_path)) as address, connect(address) as connection:
        page = Page(connection, run_id(run.path)).until(lambda page: 10 in page.steps and page.log)
        since, log_since = page.since, page.log_since
    with pytest.raises(ConnectionClosed):
        page.until(lambda page: False)
    run.write_steps(11, 12)
    with (run.path / "train.log").open("a") as file:
        file.write("two\n")
    with serving(make_runs_app(tmp_path)) as address, connect(address) as connection:
        again = Page(connection, run_id(run.path), since, log_since).until(lambda page: page.log)
        assert (again.until(lambda page: page.steps).steps, again.log) == ([11, 12], "two\n")


def test_a_long_run_comes_in_parts(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start(25_000).write_many_steps(25_000)
    (run.path / "train.log").write_text("ü" * 100_000)
    with (
        serving(make_runs_app(tmp_path)) as address,
        connect(address, max_size=4 << 20) as connection,
    ):
        page = Page(connection, run_id(run.path))
        page.until(lambda page: 25_000 in page.steps and len(page.log) == 100_000)
    assert page.steps == list(range(1, 25_001))
    parts = [message for message in page.messages if message.end is not None]
    assert max(len(message.events) for message in parts) <= live_broadcaster.MAX_RECORDS
    assert len(parts) >= 13


def test_a_torn_line_waits_and_a_run_begun_anew_begins_anew(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 40)
    line = run.events.read_bytes().splitlines(keepends=True)[-1]
    with serving(make_runs_app(tmp_path)) as address, connect(address) as connection:
        page = Page(connection, run_id(run.path)).until(lambda page: 40 in page.steps)
        with run.events.open("ab") as file:
            file.write(line.replace(b'"step": 40', b'"step": 41')[:-9])
            file.flush()
            page.rest()
            assert 41 not in page.steps
            file.write(line[-9:])
        page.until(lambda page: 41 in page.steps)
        run.events.rename(run.path / "earlier.jsonl")
        run.write_start().write_steps(1, 2)
        page.until(lambda page: page.steps == [1, 2])


def test_who_says_what_cannot_be_understood_is_sent_away(tmp_path: Path) -> None:
    RunFolderWriter(tmp_path / "run").write_start()
    with TestClient(make_runs_app(tmp_path)) as client:
        for words in ("", "[]", '{"run": 3}', '{"since": "x"}', '{"more": 1}', "{" * 9999):
            with client.websocket_connect("/api/v1/live") as page:
                page.send_text(words)
                assert code_at_the_end(page) == 1008, words
        with client.websocket_connect("/api/v1/live") as page:
            page.send_bytes(b"\0")
            assert code_at_the_end(page) == 1008


def test_so_many_pages_and_no_more(tmp_path: Path) -> None:
    app = make_runs_app(tmp_path, most=2)
    with TestClient(app) as client:
        with (
            client.websocket_connect("/api/v1/live") as one,
            client.websocket_connect("/api/v1/live") as two,
        ):
            assert one.receive_json()["runs"] == two.receive_json()["runs"] == []
            with client.websocket_connect("/api/v1/live") as three:
                assert code_at_the_end(three) == 1013
        until(lambda: not app.state.services.broadcaster.is_full)
        with client.websocket_connect("/api/v1/live") as four:
            assert four.receive_json()["runs"] == []


def test_who_does_not_read_is_dropped_and_the_others_hear_on(tmp_path: Path) -> None:
    """A raw connection that stops reading from its socket while megabytes are sent to it."""
    run = RunFolderWriter(tmp_path / "run").write_start(25_000).write_many_steps(25_000)
    app = make_runs_app(tmp_path, send_s=0.5)
    watcher = app.state.services.broadcaster
    with serving(app) as address, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = address.removeprefix("ws://").split("/")[0].split(":")
        deaf.connect((host, int(port)))
        deaf.sendall(
            f"GET /api/v1/live HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n".encode()
        )
        assert b"101" in deaf.recv(64)
        follow = json.dumps({"run": run_id(run.path)}).encode()
        deaf.sendall(bytes([0x81, 0x80 | len(follow), 0, 0, 0, 0]) + follow)
        with connect(address) as connection:
            page = Page(connection, run_id(run.path), run.events.stat().st_size)
            page.until(lambda page: page.messages)
            until(lambda: len(watcher._subscribers) == 1)
            run.write_steps(25_001, 25_001)
            page.until(lambda page: page.steps == [25_001])


def test_a_slow_listener_gets_the_newest_list_and_not_every_one(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    watcher = live_broadcaster.LiveBroadcaster(RunService(Workspace(tmp_path)), empty_queue)

    async def scene() -> list[int]:
        seen: list[int] = []
        listener = live_broadcaster.Subscriber()

        async def send(text: str) -> None:
            seen.extend(one["step"] for one in json.loads(text)["runs"] or [])
            seen.extend(one["step"] for one in json.loads(text)["changed"])
            await asyncio.sleep(0.3)

        telling = asyncio.create_task(watcher.stream_to(listener, send))
        for step in range(1, 101):
            run.write_steps(step, step)
            await asyncio.sleep(0.01)
        deadline = time.monotonic() + PATIENCE_S
        while 100 not in seen:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        return seen

    seen = asyncio.run(scene())
    assert seen == sorted(set(seen))
    assert len(seen) < 50


def test_an_ended_run_that_another_request_reads_meanwhile_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        RunFolderWriter(tmp_path / f"run-{number}").write_start().write_steps(1, 500).write_exit()
    runs = RunService(Workspace(tmp_path))
    monkeypatch.setattr(run_service, "READ_BUDGET_S", -1.0)

    def queue() -> Queue:
        """Read everything between two looks at the runs, as the list of runs does."""
        monkeypatch.setattr(run_service, "READ_BUDGET_S", 60.0)
        runs.summaries()
        return empty_queue()

    watcher = live_broadcaster.LiveBroadcaster(runs, queue)
    first = watcher._list_snapshot()
    assert first.unread
    until(lambda: watcher._list_snapshot() is not first)
    assert watcher._list_snapshot().list_fields(first.versions[0], None) == {}


def test_nobody_listens_nothing_is_watched_and_a_failure_ends_in_a_closed_connection(
    tmp_path: Path,
) -> None:
    looks: list[float] = []

    def queue() -> Queue:
        looks.append(time.monotonic())
        if len(looks) == 3:
            raise OSError("the disk is gone")
        return empty_queue()

    watcher = live_broadcaster.LiveBroadcaster(RunService(Workspace(tmp_path)), queue)

    async def nothing(text: str) -> None:
        return

    async def scene() -> None:
        with pytest.raises(OSError, match="the disk is gone"):
            await asyncio.wait_for(
                watcher.stream_to(live_broadcaster.Subscriber(), nothing), PATIENCE_S
            )
        telling = asyncio.create_task(watcher.stream_to(live_broadcaster.Subscriber(), nothing))
        while len(looks) < 6:
            await asyncio.sleep(0.01)
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        count = len(looks)
        await asyncio.sleep(0.3)
        assert len(looks) <= count + 1, "more than the look that was under way"

    asyncio.run(scene())


def test_only_what_changed_of_many_runs_is_sent(tmp_path: Path) -> None:
    folders = [RunFolderWriter(tmp_path / f"run-{at}").write_start() for at in range(20)]
    with serving(make_runs_app(tmp_path)) as address, connect(address) as connection:
        page = Page(connection, "0" * 12)
        first = page.hear()
        assert first.runs == []
        assert len(first.model_dump_json()) < 1000
        page.rest()
        assert len(page.messages) == 1
        folders[7].write_steps(1, 1)
        page.until(lambda page: page.messages[-1].changed)
        assert [run.name for run in page.messages[-1].changed] == ["run-7"]
        assert len(page.messages[-1].model_dump_json()) < 2000
        shutil.rmtree(folders[3].path)
        page.until(lambda page: page.messages[-1].removed)
        assert page.messages[-1].removed == [run_id(folders[3].path)]


def test_reading_more_of_a_run_that_has_ended_is_no_change() -> None:
    def make_runs(**fields: object) -> list[RunSummary]:
        return [make_run(name).model_copy(update=fields) for name in ("old", "new")]

    first = live_broadcaster.ListSnapshot(make_runs(), empty_queue(), unread={"old"})
    second = first.update(make_runs(step=9), empty_queue())
    assert [run.id for run in second.list_fields(1, None)["changed"]] == ["new"]
    third = second.update(make_runs(step=10), empty_queue())
    assert [run.id for run in third.list_fields(2, None)["changed"]] == ["old", "new"]
    running = first.update(make_runs(state="running"), empty_queue())
    assert [run.id for run in running.list_fields(1, None)["changed"]] == ["old", "new"]
    renamed = first.update(make_runs(name="The fox"), empty_queue())
    assert [run.id for run in renamed.list_fields(1, None)["changed"]] == ["old", "new"]
