"""A web server on loopback that serves bytes, and fails as it is told to."""

from __future__ import annotations

import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Fault = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ImageServer

    def log_message(self, format: str, *values: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests[path] += 1
        self.server.headers_of[path].append(dict(self.headers))
        faults = self.server.faults.get(path, [])
        content = self.server.files.get(path)
        if content is None:
            self.send(404, b"nothing here")
        elif faults:
            faults.pop(0)(self, content)
        else:
            self.send_file(content)

    def send_file(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or not self.server.sends_parts:
            self.send(200, content, ETag=f'"{len(content)}"')
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        place = f"bytes {first}-{last}/{len(content)}"
        self.send(206, content[first : last + 1], ETag=f'"{len(content)}"', Content_Range=place)

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **_dashed(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class ImageServer(ThreadingHTTPServer):
    """files: by path. faults: what the next requests of a path get instead. requests: by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.requests: Counter[str] = Counter()
        self.headers_of: dict[str, list[dict[str, str]]] = defaultdict(list)
        self.sends_parts = True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


def status(code: int, **headers: str) -> Fault:
    return lambda handler, content: handler.send(code, b"", **headers)


def cut(handler: Handler, content: bytes) -> None:
    """Send half of the file, and close the connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.send_header("ETag", f'"{len(content)}"')
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def wrong_length(handler: Handler, content: bytes) -> None:
    """Announce fewer bytes than the file has: what arrives is no whole image."""
    handler.send(200, content[: len(content) // 3])


def redirect(target: str) -> Fault:
    return lambda handler, content: handler.send(302, b"", Location=target)


def _dashed(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@contextmanager
def serve() -> Iterator[ImageServer]:
    server = ImageServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
