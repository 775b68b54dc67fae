"""Compression of JSON responses. The static pages are compressed when they are built."""

from __future__ import annotations

import gzip

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COMPRESSED_FROM_BYTES = 1024
LEVEL = 4  # half the time of the usual 9, a few per cent more bytes


class JsonCompression:
    """ASGI middleware that compresses JSON responses of one message for clients that accept gzip.

    Images, downloads and responses in several messages are sent as they are.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "gzip" not in Headers(scope=scope).get("accept-encoding", ""):
            await self.app(scope, receive, send)
            return
        start: Message | None = None

        async def send_compressed(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message  # its headers depend on the body
                return
            if start is not None:
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    message = _compress(start, message)
                await send(start)
                start = None
            await send(message)

        await self.app(scope, receive, send_compressed)


def _compress(start: Message, message: Message) -> Message:
    """Return the compressed body, and change the headers of `start`."""
    headers, body = MutableHeaders(scope=start), message.get("body", b"")
    is_json = headers.get("content-type", "").partition(";")[0] == "application/json"
    if not is_json or len(body) < COMPRESSED_FROM_BYTES or "content-encoding" in headers:
        return message
    packed = gzip.compress(body, LEVEL, mtime=0)
    headers["content-encoding"] = "gzip"
    headers["content-length"] = str(len(packed))
    headers.add_vary_header("accept-encoding")
    return {**message, "body": packed}
