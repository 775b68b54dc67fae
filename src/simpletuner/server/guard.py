"""Who may ask, and what every answer carries: one ASGI middleware before all else, HTTP and WebSocket alike.

A page of another site must not reach the server through the visitor's browser (Host, Origin, Sec-Fetch-Site,
content types that no form can send), nor frame it, nor read its answers (no CORS header is ever sent).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable

from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simpletuner.server.refusal import Refused, body, refuse
from simpletuner.server.settings import LOOPBACK, Settings
from simpletuner.server.token import Gate

API = "/api/"
LOGIN = "/api/v1/login"
UPLOAD = re.compile(r"/api/v1/datasets/[^/]+/files/.+", re.DOTALL)
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
ANYWHERE = ("0.0.0.0", "::", "")
CHUNK_S = 60.0
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}


def cookie_name(settings: Settings) -> str:
    """With the port: browsers share cookies between the ports of a host."""
    return f"simpletuner-{settings.port}"


class Guard:
    def __init__(self, app: ASGIApp, settings: Settings, gate: Gate | None) -> None:
        self.app, self.settings, self.gate = app, settings, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        web_socket = scope["type"] == "websocket"
        if not web_socket:
            send = _with_headers(send, connection.scope["path"].startswith(API))
        try:
            self.check(connection, "GET" if web_socket else scope["method"])
        except Refused as refused:
            if web_socket:
                await send({"type": "websocket.close", "code": 1008, "reason": str(refused)})
            else:
                await JSONResponse(body(refused.complaints), refused.status)(scope, receive, send)
            return
        if not web_socket:
            receive = _limited(receive, self.limit(scope))
        await self.app(scope, receive, send)

    def check(self, connection: HTTPConnection, method: str) -> None:
        """Raises Refused."""
        host = _host(connection, self.settings)
        _origin(connection, host)
        _site(connection, method)
        if connection.scope["type"] == "http":
            _method_and_body(connection, method, self.limit(connection.scope))
        path = connection.scope["path"]
        if self.gate is not None and path.startswith(API) and path != LOGIN:
            _token(connection, self.gate, self.settings)

    def limit(self, scope: Scope) -> int:
        upload = scope["method"] == "PUT" and UPLOAD.fullmatch(scope["path"])
        return self.settings.max_upload_bytes if upload else self.settings.max_json_bytes


def _one(connection: HTTPConnection, name: str) -> str:
    """That header, "" where it is absent; sent twice, two readers could see different ones."""
    found = connection.headers.getlist(name)
    if len(found) > 1:
        refuse(400, f"the header {name} came {len(found)} times")
    return found[0].strip().lower() if found else ""


def _host(connection: HTTPConnection, settings: Settings) -> str:
    """The Host header if it is a name of ours: a foreign name that resolves here is DNS rebinding. Any port,
    since a tunnel may change it.
    """
    host = _one(connection, "host")
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", host)
    name = match[1].strip("[]") if match else ""
    if not match or not (name in _names(settings) or (settings.host in ANYWHERE and _is_address(name))):
        refuse(403, "this server does not answer to that Host; --allow-host adds a name")
    return host


def _names(settings: Settings) -> Iterable[str]:
    own = (socket.gethostname().lower(),) if settings.host in ANYWHERE else (settings.host.lower(),)
    return {*LOOPBACK, *own, *(name.lower() for name in settings.names)}


def _is_address(name: str) -> bool:
    """An address cannot be rebound, so it is safe wherever the server listens on all of them."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _origin(connection: HTTPConnection, host: str) -> None:
    origin = _one(connection, "origin")
    if origin and origin not in (f"http://{host}", f"https://{host}"):
        refuse(403, "a page of another origin may not ask this server")


def _site(connection: HTTPConnection, method: str) -> None:
    """Following a link to the front page is all that another site may do."""
    site = _one(connection, "sec-fetch-site")
    link = method == "GET" and connection.scope["path"] == "/" and connection.scope["type"] == "http"
    link = link and _one(connection, "sec-fetch-mode") == "navigate"
    link = link and _one(connection, "sec-fetch-dest") == "document"
    if site not in ("", "same-origin", "none") and not link:
        refuse(403, "a page of another site may not ask this server")


def _method_and_body(connection: HTTPConnection, method: str, limit: int) -> None:
    if method not in METHODS:
        refuse(405, f"methods are {', '.join(METHODS)}")
    length = _one(connection, "content-length") or "0"
    if not (length.isascii() and length.isdigit()):
        refuse(400, "Content-Length is a number of bytes")
    if int(length) > limit:
        refuse(413, f"a body of {length} bytes is more than the {limit} that are taken here")
    bare = length == "0" and not _one(connection, "transfer-encoding")
    if method in ("GET", "HEAD") or (method == "DELETE" and bare):
        return
    upload = method == "PUT" and UPLOAD.fullmatch(connection.scope["path"])
    wanted = "application/octet-stream" if upload else "application/json"
    if _one(connection, "content-type").split(";")[0].strip() != wanted:
        refuse(415, f"send this as {wanted}")


def _token(connection: HTTPConnection, gate: Gate, settings: Settings) -> None:
    if gate.admits(connection.cookies.get(cookie_name(settings), "")):
        return
    word = connection.headers.get("authorization", "")
    if not word.lower().startswith("bearer "):
        refuse(401, "log in first, or send the token as Authorization: Bearer")
    try_word(connection, gate, word[len("bearer ") :].strip())


def try_word(connection: HTTPConnection, gate: Gate, word: str) -> None:
    """Raises Refused: 401 for a wrong token or launch word, 429 during a pause."""
    address = connection.client.host if connection.client else ""
    pause = gate.pause_s(address)
    if pause:
        refuse(429, f"too many wrong tokens; try again in {pause:.0f} s")
    if not gate.opens(address, word):
        refuse(401, "that is not the token")


def _with_headers(send: Send, api: bool) -> Send:
    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            headers.setdefault("cache-control", "no-store" if api else "no-cache")
        await send(message)

    return told


def _limited(receive: Receive, limit: int) -> Receive:
    """Counts a body that did not say its length, and does not wait for ever for the next part of it."""
    seen, ended = 0, False

    async def read() -> Message:
        nonlocal seen, ended
        if ended:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), CHUNK_S)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, "the rest of the body did not come") from error
        seen += len(message.get("body", b""))
        ended = not message.get("more_body", False)
        if seen > limit:
            raise HTTPException(413, f"a body of more than {limit} bytes is not taken here")
        return message

    return read
