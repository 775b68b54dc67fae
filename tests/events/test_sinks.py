from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from simpletuner.errors import ConfigError
from simpletuner.events import terminal_sink, webhook_sink
from simpletuner.events.event_types import (
    DatasetScanned,
    Event,
    LossEvaluated,
    NoticeIssued,
    RunFailed,
    RunFinished,
    StageCompleted,
    StageProgress,
    StageStarted,
    StepCompleted,
    WarningIssued,
)
from simpletuner.events.formatting import SmoothedMean, format_bytes, format_duration, format_rate
from simpletuner.events.sinks import close_all_sinks, fan_out
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.events.terminal_sink import TerminalSink


def step(number: int, loss: float = 0.5) -> StepCompleted:
    return StepCompleted(number, 20, 0, loss, 1e-4, 1.0, 0.5, 1, 3.25)


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, event: Event) -> None:
        self.calls += 1
        raise OSError("disk full")


def test_a_failing_sink_is_reported_once_and_dropped() -> None:
    before, after, broken = [], [], Broken()
    emit = fan_out([before.append, broken, after.append])
    for number in range(3):
        emit(NoticeIssued(str(number)))
    warning = WarningIssued("Broken is switched off: OSError: disk full")
    assert broken.calls == 1
    assert before == [NoticeIssued("0"), warning, NoticeIssued("1"), NoticeIssued("2")]
    assert after == before


def test_a_sink_that_must_stay_is_tried_again() -> None:
    """Reported once for each series of failures."""

    class Log(Broken):
        def __call__(self, event: Event) -> None:
            numbers.append(event)
            if now in (1, 2, 4):
                raise OSError("disk full")

    numbers: list[Event] = []
    seen: list[Event] = []
    log = Log()
    emit = fan_out([log, seen.append], never_removed=[log])
    for now in range(6):
        emit(NoticeIssued(str(now)))
    warnings = [event.message for event in seen if isinstance(event, WarningIssued)]
    assert warnings == ["Log failed and is tried again: OSError: disk full"] * 2
    assert [event.message for event in numbers if isinstance(event, NoticeIssued)] == list("012345")


def test_a_sink_that_cannot_close_does_not_keep_others_open() -> None:
    class Stuck(Broken):
        def close(self) -> None:
            raise OSError("no answer")

    closed = []

    class Good(Broken):
        def close(self) -> None:
            closed.append(self)

    assert close_all_sinks([Good(), Stuck(), Good()]) == ["Stuck did not close: OSError: no answer"]
    assert len(closed) == 2


def test_when_every_sink_fails_the_run_goes_on() -> None:
    broken = [Broken(), Broken()]
    emit = fan_out(broken)
    emit(NoticeIssued("0"))
    emit(NoticeIssued("1"))
    assert [one.calls for one in broken] == [1, 1]


def test_a_stage_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    seen: list[Event] = []
    with StageReporter(seen.append, "encode", 10, "images") as stage:
        for _ in range(10):
            now[0] += 0.25
            stage.advance()
        stage.summary = "warm"
    assert seen[0] == StageStarted("encode", 10, "images")
    assert seen[1] == StageProgress("encode", 2, 10, 4.0, 2.0)
    assert [event.done for event in seen[1:-1]] == [2, 4, 6, 8, 10]
    assert seen[-1] == StageCompleted("encode", 10, 2.5, "warm")
    seen.clear()
    with pytest.raises(KeyError), StageReporter(seen.append, "encode", None, "images"):
        raise KeyError
    assert seen == [StageStarted("encode", None, "images")]


def test_smoothing_starts_at_the_first_value_and_settles() -> None:
    smooth = SmoothedMean(0.1)
    assert smooth(5.0) == pytest.approx(5.0)
    assert smooth(7.0) == pytest.approx((0.9 * 5 + 7) / 1.9)
    assert smooth(float("nan")) == pytest.approx((0.9 * 5 + 7) / 1.9)
    for _ in range(200):
        last = smooth(1.0)
    assert last == pytest.approx(1.0, abs=1e-6)


def test_wording_of_figures() -> None:
    assert [format_duration(s) for s in (3.14, 59.4, 187, 7500, None)] == [
        "3.1 s",
        "59 s",
        "3:07 min",
        "2:05 h",
        "?",
    ]
    assert [format_bytes(n) for n in (10, 2048, 5 << 20, 3 << 30)] == [
        "10 B",
        "2.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
    ]
    assert [format_rate(x, "it") for x in (2.0, 0.25, 0.0)] == ["2.00 it/s", "4.0 s/it", "? it/s"]


def lines(level: str = "info", every_s: float = 1000.0) -> tuple[TerminalSink, io.StringIO]:
    stream = io.StringIO()
    return TerminalSink(stream, level, every_s), stream


EVENTS = (
    StageStarted("encode", 10, "images"),
    StageProgress("encode", 5, 10, 2.0, 2.5),
    StageCompleted("encode", 10, 5.0),
    DatasetScanned("[bold]cats", 7, ((512, 512, 5), (448, 576, 2)), {"damaged": 3}),
    *(step(number, 0.5 + 0.1 * (number % 2)) for number in range(1, 21)),
    LossEvaluated(20, "d", "eval", 0.4, -0.1, 0.02, (), True),
    WarningIssued("careful [red]now"),
    RunFinished(20, 10.0, "done"),
)


def test_without_a_terminal_there_are_plain_lines() -> None:
    show, stream = lines()
    for event in EVENTS:
        show(event)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert "encode: 10 in 5.0 s" in text
    assert "encode: 5 of 10" not in text  # not yet due
    assert "512 x 512" in text
    assert "dropped: damaged" in text
    assert "[bold]cats" in text
    assert re.findall(r"step \d+", text) == ["step 1", "step 20", "step 20", "step 20"]
    assert "step 20/20 · loss 0.5" in text
    assert "2.00 it/s · 0.0 s left · 3.2 GiB" in text
    assert "change -0.1000 ± 0.0200, the best so far" in text
    assert "warning: careful [red]now" in text
    often, stream = lines(every_s=0.0)
    for event in EVENTS:
        often(event)
    assert stream.getvalue().count("loss") == 21
    assert "encode: 5 of 10, 2.0/s, 2.5 s left" in stream.getvalue()


def test_any_text_can_be_shown_in_any_encoding() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    show = TerminalSink(stream, every_s=0.0)
    for event in (*EVENTS, NoticeIssued("a \x1b[31mred\x07 \udcff 🐈\nname")):
        show(event)
    assert raw.getvalue().endswith(b"a ?[31mred? ? ?\nname\n")
    assert b"\x1b" not in raw.getvalue()


def test_level_warning_shows_warnings_only() -> None:
    show, stream = lines("warning", 0.0)
    for event in (*EVENTS, RunFailed(3, "boom", 4)):
        show(event)
    assert stream.getvalue() == "warning: careful [red]now\nfailed at step 3: boom\n"


def test_on_a_terminal_one_live_line_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(
        terminal_sink,
        "Console",
        lambda **more: Console(**more, force_terminal=True, width=120, _environ={}),
    )
    show = TerminalSink(stream)
    for event in EVENTS[:-2]:
        show(event)
    assert show._live is not None
    assert [task.description for task in show._live.tasks] == ["train"]
    assert show._live.tasks[0].completed == 20
    show(EVENTS[-2])
    show(RunFinished(20, 10.0, "done"))
    assert show._live.tasks == []
    assert not show._live.live.is_started
    text = stream.getvalue()
    assert "\x1b[?25l" in text  # cursor hidden while live
    assert text.rstrip().endswith("done at step 20 after 10 s")
    assert "encode: 10 in 5.0 s" in text


class Server(HTTPServer):
    seen: list[tuple[dict[str, str], dict[str, object]]]
    status: int


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert isinstance(self.server, Server)
            self.server.seen.append((dict(self.headers), json.loads(body)))
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    made = Server(("127.0.0.1", 0), Handler)
    made.seen, made.status = [], 204
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def hook(server: Server, **more: object) -> webhook_sink.WebhookConfig:
    url = f"http://127.0.0.1:{server.server_port}/secret"
    return webhook_sink.parse_webhook_config({"webhook_type": "raw", "callback_url": url, **more})[
        0
    ]


def test_raw_hooks_get_the_record_with_the_token(server: Server) -> None:
    send = webhook_sink.WebhookSink(hook(server, auth_token="t0ken", message_prefix="p"))
    send(WarningIssued("é"))
    send(step(1))  # below "info"
    send.close()
    headers, body = server.seen[0]
    assert len(server.seen) == 1
    assert headers["Authorization"] == "Bearer t0ken"
    assert {key: body[key] for key in ("kind", "message", "message_prefix")} == {
        "kind": "warned", "message": "é", "message_prefix": "p",
    }  # fmt: skip


def test_discord_gets_a_message_that_pings_nobody(server: Server) -> None:
    send = webhook_sink.WebhookSink(
        hook(server, webhook_type="discord", message_prefix="run 1:", log_level="debug")
    )
    send(WarningIssued("@everyone " + "x" * 3000))
    send(step(1))
    send.close()
    (_, first), (_, second) = server.seen
    assert str(first["content"]).startswith("run 1: @everyone xxx")
    assert len(str(first["content"])) == 2000
    assert first["allowed_mentions"] == {"parse": []}
    assert second["content"] == "run 1: step 1 of 20: loss 0.5000"


def test_a_dead_hook_is_dropped_without_showing_its_address(server: Server) -> None:
    server.status = 404
    others: list[Event] = []
    send = webhook_sink.WebhookSink(hook(server))
    emit = fan_out([send, others.append])
    deadline = time.monotonic() + 120
    while not any(isinstance(event, WarningIssued) for event in others):
        assert time.monotonic() < deadline
        emit(NoticeIssued("x"))
        time.sleep(0.02)
    warnings = [event.message for event in others if isinstance(event, WarningIssued)]
    assert warnings == [
        "Webhook is switched off: ConnectionError: 127.0.0.1: HTTP 404, 5 times in a row"
    ]
    assert len(server.seen) == webhook_sink.MAX_FAILURES
    send.close()


def test_a_slow_hook_neither_blocks_nor_grows() -> None:
    """It waits for an answer through all of this, and would for an hour."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        config = webhook_sink.WebhookConfig("raw", url, "", None, True, 0)
        send = webhook_sink.WebhookSink(config, limit=8, timeout_s=3600)
        send(NoticeIssued("first"))
        connection, _ = silent.accept()
        for number in range(2000):
            send(NoticeIssued(str(number)))
        assert send._queue.qsize() <= 8
        send.close(wait_s=0.1)
        assert send._thread.is_alive()
        connection.close()


def test_webhook_config_names_every_problem(tmp_path: Path) -> None:
    bad = [
        {"webhook_type": "slack", "webhook_url": "ftp://x", "log_level": "loud", "retries": 3},
        "text",
        {
            "webhook_type": "raw",
            "callback_url": "https://x",
            "ssl_no_verify": "yes",
            "auth_token": 3,
        },
    ]
    with pytest.raises(ConfigError) as caught:
        webhook_sink.parse_webhook_config(bad)
    assert [problem.location for problem in caught.value.problems] == (
        ["webhook_config[0]"] * 4 + ["webhook_config[1]"] + ["webhook_config[2]"] * 2
    )
    path = tmp_path / "hook.json"
    path.write_text(
        '{"webhook_type": "discord", "webhook_url": "https://a.b/c", "log_level": "warning"}'
    )
    assert webhook_sink.parse_webhook_config(str(path)) == (
        webhook_sink.WebhookConfig("discord", "https://a.b/c", "", None, True, 30),
    )
    with pytest.raises(ConfigError, match="none"):
        webhook_sink.parse_webhook_config(str(tmp_path / "none"))
