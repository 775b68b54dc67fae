"""JSON responses are compressed for clients that accept it, everything else is sent as it is."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.testclient import TestClient

from simpletuner.server.json_compression import JsonCompression

ROWS = [{"name": f"run-{at}", "loss": at / 7} for at in range(200)]


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(JsonCompression)

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 2000

    app.get("/rows")(lambda: ROWS)
    app.get("/few")(lambda: ROWS[:2])
    app.get("/image")(lambda: Response(b"\0" * 5000, media_type="image/png"))
    app.get("/parts")(lambda: StreamingResponse(parts(), media_type="application/json"))
    app.get("/missing")(lambda: JSONResponse({"detail": "x" * 5000}, 404))
    app.get("/nothing")(lambda: Response(status_code=204))
    return TestClient(app)


def raw_body(client: TestClient, path: str, accepted: str) -> tuple[Response, bytes]:
    with client.stream("GET", path, headers={"accept-encoding": accepted}) as answer:
        return answer, b"".join(answer.iter_raw())


def test_large_json_is_compressed_for_those_who_accept_it(client: TestClient) -> None:
    answer, body = raw_body(client, "/rows", "gzip, br")
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["vary"] == "accept-encoding"
    assert int(answer.headers["content-length"]) == len(body) < 3000
    plain, whole = raw_body(client, "/rows", "identity")
    assert "content-encoding" not in plain.headers
    assert gzip.decompress(body) == whole
    assert client.get("/rows").json() == ROWS


def test_errors_are_compressed_and_keep_their_status(client: TestClient) -> None:
    answer, body = raw_body(client, "/missing", "gzip")
    assert (answer.status_code, answer.headers["content-encoding"]) == (404, "gzip")
    assert b"xxx" in gzip.decompress(body)


@pytest.mark.parametrize(
    ("path", "size"), [("/few", 60), ("/image", 5000), ("/parts", 6000), ("/nothing", 0)]
)
def test_everything_else_is_sent_as_it_is(client: TestClient, path: str, size: int) -> None:
    answer, body = raw_body(client, path, "gzip")
    assert "content-encoding" not in answer.headers
    assert abs(len(body) - size) < 20
