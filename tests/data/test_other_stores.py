"""Google's and Azure's stores by their drivers, against the few answers of a server on loopback.

The drivers are not among the packages of the tests; without them these tests are skipped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.data.source_servers import PNG, Scanner

FILES = {
    "photos/a.png": PNG,
    "photos/a.txt": b"an a",
    "photos/inside/b.png": PNG + b"b",
    "photos/inside/b.txt": b"a b",
    "other/c.png": PNG,
}
EXPECTED = [("p/a.png", ("an a",)), ("p/inside/b.png", ("a b",))]


class StoreHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *values: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.answer(unquote(parts.path), query)

    def answer(self, path: str, query: dict[str, str]) -> None:
        raise AssertionError

    def send(self, status: int, content: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_part(self, content: bytes, **headers: str) -> None:
        asked = self.headers.get("Range") or self.headers.get("x-ms-range") or ""
        kind = "application/octet-stream"
        if not asked:
            self.send(200, content, kind, **headers)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        end = min(int(last or len(content)), len(content) - 1)
        part = content[int(first) : end + 1]
        place = f"bytes {first}-{end}/{len(content)}"
        self.send(206, part, kind, Content_Range=place, **headers)


def split_folder(prefix: str) -> tuple[list[str], list[str]]:
    """The objects and the folders directly below a prefix."""
    below = [name.removeprefix(prefix) for name in FILES if name.startswith(prefix)]
    folders = {prefix + name.split("/")[0] + "/" for name in below if "/" in name}
    return [prefix + name for name in below if "/" not in name], sorted(folders)


class GoogleHandler(StoreHandler):
    def answer(self, path: str, query: dict[str, str]) -> None:
        name = path.partition("/o/")[2]
        if name in FILES and (query.get("alt") == "media" or path.startswith("/download")):
            self.send_part(FILES[name])
        elif name in FILES:
            self.send_json(self.describe(name))
        elif name or not path.endswith("/o"):
            self.send(404, b"{}", "application/json")
        else:
            names, folders = split_folder(query.get("prefix", ""))
            items = [self.describe(name) for name in names]
            self.send_json({"items": items, "prefixes": folders})

    def describe(self, name: str) -> dict[str, object]:
        return {
            "name": name,
            "bucket": "box",
            "size": str(len(FILES[name])),
            "etag": f"e{len(FILES[name])}",
            "generation": "1",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), "application/json")


class AzureHandler(StoreHandler):
    def answer(self, path: str, query: dict[str, str]) -> None:
        name = path.partition("/box/")[2]
        if query.get("comp") == "list" and "box" in path:
            names, folders = split_folder(query.get("prefix", ""))
            found = "".join(self.describe(name) for name in names)
            found += "".join(f"<BlobPrefix><Name>{one}</Name></BlobPrefix>" for one in folders)
            listing = f'<EnumerationResults ContainerName="box"><Blobs>{found}</Blobs></EnumerationResults>'
            self.send(200, listing.encode(), "application/xml")
        elif name in FILES:
            self.send_part(
                FILES[name],
                ETag=f'"e{len(FILES[name])}"',
                Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT",
                x_ms_blob_type="BlockBlob",
            )
        else:
            self.send(404, b"", "application/xml", x_ms_error_code="BlobNotFound")

    def describe(self, name: str) -> str:
        size = len(FILES[name])
        return (
            f"<Blob><Name>{name}</Name><Properties><Content-Length>{size}</Content-Length>"
            f"<Etag>e{size}</Etag><Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified>"
            "<BlobType>BlockBlob</BlobType></Properties></Blob>"
        )


@contextmanager
def serve_store(handler: type[StoreHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def check(scanner: Scanner, address: str) -> None:
    found = scanner.scan(instance_data_dir=address)
    assert [(item.sample.id, item.sample.captions) for item in found.samples] == EXPECTED
    assert found.samples[1].sample.file.read_bytes(1 << 20) == PNG + b"b"
    assert scanner.scan(instance_data_dir=address) == found


def test_google_cloud_storage(scanner: Scanner, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcsfs")
    with serve_store(GoogleHandler) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        check(scanner, "gs://box/photos")


def test_azure_blob_storage(scanner: Scanner, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("adlfs")
    with serve_store(AzureHandler) as url:
        key = base64.b64encode(b"key").decode()
        text = f"AccountName=me;AccountKey={key};BlobEndpoint={url}/me"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
        check(scanner, "az://box/photos")
