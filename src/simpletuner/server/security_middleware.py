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

from simpletuner.server.api_errors import ApiError, abort, error_body
from simpletuner.server.settings import LOOPBACK_HOSTS, ServerSettings
from simpletuner.server.token_auth import TokenAuth

API_PREFIX = "/api/"
LOGIN_PATH = "/api/v1/login"
UPLOAD_PATH = re.compile(r"/api/v1/datasets/[^/]+/files/.+", re.DOTALL)
ALLOWED_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
WILDCARD_HOSTS = ("0.0.0.0", "::", "")
BODY_CHUNK_TIMEOUT_S = 60.0
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}


def cookie_name(settings: ServerSettings) -> str:
    """With the port: browsers share cookies between the ports of a host."""
    return f"simpletuner-{settings.port}"


class SecurityMiddleware:
    def __init__(self, app: ASGIApp, settings: ServerSettings, gate: TokenAuth | None) -> None:
        self.app, self.settings, self.token_auth = app, settings, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        web_socket = scope["type"] == "websocket"
        if not web_socket:
            send = _add_security_headers(send, connection.scope["path"].startswith(API_PREFIX))
        try:
            self.check_request(connection, "GET" if web_socket else scope["method"])
        except ApiError as refused:
            if web_socket:
                await send({"type": "websocket.close", "code": 1008, "reason": str(refused)})
            else:
                await JSONResponse(error_body(refused.details), refused.status)(
                    scope, receive, send
                )
            return
        if not web_socket:
            receive = _limit_body(receive, self.max_body_bytes(scope))
        await self.app(scope, receive, send)

    def check_request(self, connection: HTTPConnection, method: str) -> None:
        """Raises Refused."""
        host = _check_host(connection, self.settings)
        _check_origin(connection, host)
        _check_fetch_site(connection, method)
        if connection.scope["type"] == "http":
            _check_method_and_body(connection, method, self.max_body_bytes(connection.scope))
        path = connection.scope["path"]
        if self.token_auth is not None and path.startswith(API_PREFIX) and path != LOGIN_PATH:
            _check_auth(connection, self.token_auth, self.settings)

    def max_body_bytes(self, scope: Scope) -> int:
        upload = scope["method"] == "PUT" and UPLOAD_PATH.fullmatch(scope["path"])
        return self.settings.max_upload_bytes if upload else self.settings.max_json_bytes


def _single_header(connection: HTTPConnection, name: str) -> str:
    """That header, "" where it is absent; sent twice, two readers could see different ones."""
    found = connection.headers.getlist(name)
    if len(found) > 1:
        abort(400, f"the header {name} came {len(found)} times")
    return found[0].strip().lower() if found else ""


def _check_host(connection: HTTPConnection, settings: ServerSettings) -> str:
    """The Host header if it is a name of ours: a foreign name that resolves here is DNS rebinding. Any port,
    since a tunnel may change it.
    """
    host = _single_header(connection, "host")
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", host)
    name = match[1].strip("[]") if match else ""
    if not match or not (
        name in _allowed_hosts(settings) or (settings.host in WILDCARD_HOSTS and _is_address(name))
    ):
        abort(403, "this server does not answer to that Host; --allow-host adds a name")
    return host


def _allowed_hosts(settings: ServerSettings) -> Iterable[str]:
    own = (
        (socket.gethostname().lower(),)
        if settings.host in WILDCARD_HOSTS
        else (settings.host.lower(),)
    )
    return {*LOOPBACK_HOSTS, *own, *(name.lower() for name in settings.allowed_hosts)}


def _is_address(name: str) -> bool:
    """An address cannot be rebound, so it is safe wherever the server listens on all of them."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_origin(connection: HTTPConnection, host: str) -> None:
    origin = _single_header(connection, "origin")
    if origin and origin not in (f"http://{host}", f"https://{host}"):
        abort(403, "a page of another origin may not ask this server")


def _check_fetch_site(connection: HTTPConnection, method: str) -> None:
    """Following a link to the front page is all that another site may do."""
    site = _single_header(connection, "sec-fetch-site")
    link = (
        method == "GET" and connection.scope["path"] == "/" and connection.scope["type"] == "http"
    )
    link = link and _single_header(connection, "sec-fetch-mode") == "navigate"
    link = link and _single_header(connection, "sec-fetch-dest") == "document"
    if site not in ("", "same-origin", "none") and not link:
        abort(403, "a page of another site may not ask this server")


def _check_method_and_body(connection: HTTPConnection, method: str, limit: int) -> None:
    if method not in ALLOWED_METHODS:
        abort(405, f"methods are {', '.join(ALLOWED_METHODS)}")
    length = _single_header(connection, "content-length") or "0"
    if not (length.isascii() and length.isdigit()):
        abort(400, "Content-Length is a number of bytes")
    if int(length) > limit:
        abort(413, f"a body of {length} bytes is more than the {limit} that are taken here")
    bare = length == "0" and not _single_header(connection, "transfer-encoding")
    if method in ("GET", "HEAD") or (method == "DELETE" and bare):
        return
    upload = method == "PUT" and UPLOAD_PATH.fullmatch(connection.scope["path"])
    wanted = "application/octet-stream" if upload else "application/json"
    if _single_header(connection, "content-type").split(";")[0].strip() != wanted:
        abort(415, f"send this as {wanted}")


def _check_auth(connection: HTTPConnection, gate: TokenAuth, settings: ServerSettings) -> None:
    if gate.accepts_cookie(connection.cookies.get(cookie_name(settings), "")):
        return
    word = connection.headers.get("authorization", "")
    if not word.lower().startswith("bearer "):
        abort(401, "log in first, or send the token as Authorization: Bearer")
    check_token(connection, gate, word[len("bearer ") :].strip())


def check_token(connection: HTTPConnection, gate: TokenAuth, word: str) -> None:
    """Raises Refused: 401 for a wrong token or launch word, 429 during a pause."""
    address = connection.client.host if connection.client else ""
    pause = gate.retry_delay_s(address)
    if pause:
        abort(429, f"too many wrong tokens; try again in {pause:.0f} s")
    if not gate.accepts_token(address, word):
        abort(401, "that is not the token")


def _add_security_headers(send: Send, api: bool) -> Send:
    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY_HEADERS)
            headers.setdefault("cache-control", "no-store" if api else "no-cache")
        await send(message)

    return told


def _limit_body(receive: Receive, limit: int) -> Receive:
    """Counts a body that did not say its length, and does not wait for ever for the next part of it."""
    seen, ended = 0, False

    async def read() -> Message:
        nonlocal seen, ended
        if ended:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), BODY_CHUNK_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise HTTPException(408, "the rest of the body did not come") from error
        seen += len(message.get("body", b""))
        ended = not message.get("more_body", False)
        if seen > limit:
            raise HTTPException(413, f"a body of more than {limit} bytes is not taken here")
        return message

    return read
