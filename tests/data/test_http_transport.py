"""Requests of files: what goes along with a redirect, slow servers, and parts of a file."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from simpletuner.data.http_transport import HttpTransport
from simpletuner.data.remote_file import printable_location
from simpletuner.data.transports import PartialDownload, TransferError
from tests.data.image_server import ImageServer, cut, redirect, serve, status

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def other() -> Iterator[ImageServer]:
    with serve() as running:
        running.files["/x"] = CONTENT
        yield running


def download(transport: HttpTransport, url: str, max_bytes: int = 1 << 20) -> bytes:
    partial = PartialDownload(io.BytesIO(), max_bytes)
    transport.download(url, partial)
    assert isinstance(partial.file, io.BytesIO)
    return partial.file.getvalue()


def test_a_token_stays_with_its_host(server: ImageServer, other: ImageServer) -> None:
    host = server.url.removeprefix("http://")
    transport = HttpTransport({"Authorization": "Bearer t"}, host)
    server.files |= {"/x": CONTENT, "/away": b" ", "/near": b" "}
    server.faults = {"/away": [redirect(f"{other.url}/x")], "/near": [redirect("/x")]}
    assert download(transport, f"{server.url}/away") == CONTENT
    assert server.headers_of["/away"][0]["Authorization"] == "Bearer t"
    assert "Authorization" not in other.headers_of["/x"][0]
    assert download(transport, f"{server.url}/near") == CONTENT
    assert server.headers_of["/x"][0]["Authorization"] == "Bearer t"
    download(transport, f"{other.url}/x")
    assert "Authorization" not in other.headers_of["/x"][1]


def test_a_server_that_sends_almost_nothing_is_given_up(other: ImageServer) -> None:
    seconds = iter(range(0, 10**6, 100))
    with pytest.raises(TransferError, match="bytes arrived in 100 s") as raised:
        download(HttpTransport(clock=lambda: float(next(seconds))), f"{other.url}/x")
    assert not raised.value.permanent


def test_a_cut_download_is_continued_only_in_the_same_file(other: ImageServer) -> None:
    transport = HttpTransport()
    partial = PartialDownload(io.BytesIO(), 1 << 20)
    for changed in (CONTENT, CONTENT[::-1] + b"longer"):
        partial.restart()
        other.files["/x"] = CONTENT
        other.faults["/x"] = [cut]
        with pytest.raises(TransferError, match=f"cut after {len(CONTENT) // 2} of"):
            transport.download(f"{other.url}/x", partial)
        other.files["/x"] = changed
        if changed != CONTENT:  # a server answers If-Range of another version with all of it
            other.sends_parts = False
        transport.download(f"{other.url}/x", partial)
        assert isinstance(partial.file, io.BytesIO)
        assert partial.file.getvalue() == changed


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "is not an http or https address"),
        ("ftp://127.0.0.1/x", "is not an http or https address"),
        ("http://", "is not an http or https address"),
        ("http://a\nb/", "is not|has no address|in the exchange"),
        ("http://127.0.0.1:9/x", "refused"),
    ],
)
def test_what_is_not_asked_for(url: str, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        HttpTransport().read_range(url, 0, 1)


def test_limits_and_parts(other: ImageServer) -> None:
    transport = HttpTransport()
    url = f"{other.url}/x"
    with pytest.raises(TransferError, match="is larger than") as raised:
        download(transport, url, len(CONTENT) - 1)
    assert raised.value.permanent
    assert transport.read_range(url, 256, 3) == bytes([0, 1, 2])
    assert transport.file_size(url) == len(CONTENT)
    with pytest.raises(TransferError, match="of 9 bytes arrived"):
        transport.read_range(url, len(CONTENT) - 3, 9)
    other.faults["/x"] = [status(429, Retry_After="100000")]
    with pytest.raises(TransferError, match="HTTP 429 Too Many Requests") as raised:
        transport.file_size(url)
    assert raised.value.retry_after_s == 120
    other.sends_parts = False
    with pytest.raises(TransferError, match="does not send parts"):
        transport.read_range(url, 0, 1)


def test_messages_show_no_secrets() -> None:
    shown = printable_location("https://me:pw@host:8/a%20b.png?X-Amz-Signature=abc")
    assert shown == "https://host:8/a b.png?..."
    assert printable_location("s3://bucket/a.png") == "s3://bucket/a.png"
