"""A client that sends half a header holds neither its connection nor those of others."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn

from simpletuner.server.http_protocol import ConnectionCounter, make_protocol

PATIENCE_S = 60.0
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def answer(scope, receive, send) -> None:
    if scope["type"] == "lifespan":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def served(
    counter: ConnectionCounter, header_timeout_s: float, keep_alive_s: int = 5
) -> Iterator[int]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    config = uvicorn.Config(
        answer,
        log_level="error",
        lifespan="off",
        http=make_protocol(counter, header_timeout_s),
        timeout_keep_alive=keep_alive_s,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    connection.sendall(data)
    return connection


def read(connection: socket.socket) -> bytes:
    """What arrives next; nothing when the other side has closed the connection."""
    try:
        return connection.recv(4096)
    except ConnectionError:
        return b""


@pytest.mark.parametrize("data", [b"", b"G", b"GET / HTTP/1.1\r\nHost: loc", REQUEST + b"GET /"])
def test_half_a_header_has_a_deadline(data: bytes) -> None:
    with served(ConnectionCounter(), 0.2, 1) as port, connect(port, data) as connection:
        if data.startswith(REQUEST):
            assert b"204" in read(connection)
        assert read(connection) == b""


def test_a_request_whose_body_is_slow_is_not_cut_by_the_header_deadline() -> None:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\na"
    with (
        served(ConnectionCounter(), 0.2) as port,
        connect(port, head) as connection,
        connect(port, b"G") as stuck,
    ):
        assert read(stuck) == b""  # its deadline, which began later, has passed
        connection.sendall(b"b")
        assert b"204" in read(connection)


def test_one_client_cannot_hold_all_connections() -> None:
    counter = ConnectionCounter(limit=3)
    with served(counter, PATIENCE_S) as port:
        held = [connect(port, REQUEST) for _ in range(3)]
        assert all(b"204" in read(connection) for connection in held)
        with connect(port) as refused:
            assert read(refused) == b""
        held.pop().close()
        for _ in range(100):  # until the server has noticed that
            with connect(port) as later, contextlib.suppress(ConnectionError):
                later.sendall(REQUEST)
                if b"204" in read(later):
                    break
        else:
            pytest.fail("the place was not given back")
        for connection in held:
            connection.close()
