"""Security of all requests: one ASGI middleware outside of everything else, for HTTP and WebSocket.

The threat is a page of another site that reaches this server through the visitor's browser. It must
not be able to send a request (checks of Host, Origin, Sec-Fetch-Site and content types that no HTML
form can send), to embed a page in a frame, or to read a response (no CORS header is ever sent).

The order of the checks matters, and each one relies on those before it:

1. The security headers are attached to `send` before anything can fail, so that error responses,
   also those to unexpected exceptions, carry them.
2. Host comes first. With a foreign name that resolves to this machine (DNS rebinding), the browser
   considers the attacker's page and this server the same origin, so Origin and Sec-Fetch-Site would
   look harmless.
3. Origin is compared with that verified Host. Every browser sends it with WebSocket handshakes and
   with requests that change state; Sec-Fetch-Site also covers plain GET requests, which carry no
   Origin.
4. Method, declared length and content type are checked from the headers alone, before any byte of
   the body is read or any route runs.
5. The token comes last of the checks: only a request that no foreign page can have sent may count
   as a failed attempt. Otherwise a foreign page could lock the user out by sending wrong tokens.
6. The body is counted while it is read, because a request with Transfer-Encoding: chunked declares
   no length.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
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
MIN_BODY_BYTES_PER_S = 1024  # averaged over the body, after the first minute
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}


def cookie_name(settings: ServerSettings) -> str:
    """Return the name of the login cookie.

    It contains the port, because ports of a host share cookies.
    """
    return f"simpletuner-{settings.port}"


class SecurityMiddleware:
    """ASGI middleware that checks every request; the module's docstring explains the order."""

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, token_auth: TokenAuth | None
    ) -> None:
        self.app = app
        self.settings = settings
        self.token_auth = token_auth

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
        except ApiError as error:
            if web_socket:
                await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
            else:
                response = JSONResponse(error_body(error.details), error.status)
                await response(scope, receive, send)
            return
        if not web_socket:
            receive = _limit_body(receive, self.max_body_bytes(scope))
        await self.app(scope, receive, send)

    def check_request(self, connection: HTTPConnection, method: str) -> None:
        """Run all checks that need only the headers. Raises ApiError at the first that fails."""
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
    """Return the header in lower case, or "" if it is absent.

    Raises ApiError 400 for a duplicate header: a proxy and this server could each use another of
    the values.
    """
    values = connection.headers.getlist(name)
    if len(values) > 1:
        abort(400, f"the header {name} was sent {len(values)} times; it is allowed once")
    return values[0].strip().lower() if values else ""


def _check_host(connection: HTTPConnection, settings: ServerSettings) -> str:
    """Return the Host header. Raises ApiError 403 unless it is a name of this server.

    A foreign name that resolves to this machine is a DNS rebinding attack. Any port is accepted,
    because an SSH tunnel may change it.
    """
    host = _single_header(connection, "host")
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", host)
    name = match[1].strip("[]") if match else ""
    if not match or not (
        name in _allowed_hosts(settings) or (settings.host in WILDCARD_HOSTS and _is_address(name))
    ):
        abort(
            403,
            "this server does not accept that Host; --allow-host NAME allows another name",
        )
    return host


def _allowed_hosts(settings: ServerSettings) -> Iterable[str]:
    own = (
        (socket.gethostname().lower(),)
        if settings.host in WILDCARD_HOSTS
        else (settings.host.lower(),)
    )
    return {*LOOPBACK_HOSTS, *own, *(name.lower() for name in settings.allowed_hosts)}


def _is_address(name: str) -> bool:
    """Return True for an IP address, which DNS rebinding cannot redirect."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_origin(connection: HTTPConnection, host: str) -> None:
    """Raise ApiError 403 for a request from another origin; `host` is already verified."""
    origin = _single_header(connection, "origin")
    if origin and origin not in (f"http://{host}", f"https://{host}"):
        abort(403, "requests from pages of another origin are not allowed")


def _check_fetch_site(connection: HTTPConnection, method: str) -> None:
    """Raise ApiError 403 for requests from another site, except a link to the start page."""
    site = _single_header(connection, "sec-fetch-site")
    is_link = (
        method == "GET" and connection.scope["path"] == "/" and connection.scope["type"] == "http"
    )
    is_link = is_link and _single_header(connection, "sec-fetch-mode") == "navigate"
    is_link = is_link and _single_header(connection, "sec-fetch-dest") == "document"
    if site not in ("", "same-origin", "none") and not is_link:
        abort(403, "requests from pages of another site are not allowed")


def _check_method_and_body(connection: HTTPConnection, method: str, limit: int) -> None:
    """Check the method, the declared body length (at most `limit` bytes) and the content type.

    An HTML form of another site can send neither application/json nor application/octet-stream.
    """
    if method not in ALLOWED_METHODS:
        abort(405, f"allowed methods are {', '.join(ALLOWED_METHODS)}")
    length = _single_header(connection, "content-length") or "0"
    if not (length.isascii() and length.isdigit()):
        abort(400, "Content-Length must be a number of bytes")
    if int(length) > limit:
        abort(413, f"the body has {length} bytes; at most {limit} are allowed")
    is_empty = length == "0" and not _single_header(connection, "transfer-encoding")
    if method in ("GET", "HEAD") or (method == "DELETE" and is_empty):
        return
    upload = method == "PUT" and UPLOAD_PATH.fullmatch(connection.scope["path"])
    expected = "application/octet-stream" if upload else "application/json"
    if _single_header(connection, "content-type").split(";")[0].strip() != expected:
        abort(415, f"the content type must be {expected}")


def _check_auth(
    connection: HTTPConnection, token_auth: TokenAuth, settings: ServerSettings
) -> None:
    if token_auth.accepts_cookie(connection.cookies.get(cookie_name(settings), "")):
        return
    header = connection.headers.get("authorization", "")
    if not header.lower().startswith("bearer "):
        abort(401, "log in first, or send the token in the header Authorization: Bearer TOKEN")
    check_token(connection, token_auth, header[len("bearer ") :].strip())


def check_token(connection: HTTPConnection, token_auth: TokenAuth, secret: str) -> None:
    """Check a token or login code.

    Raises ApiError: 401 if it is wrong, 429 after too many wrong ones. The right one is accepted at
    any time: clients behind one address (a proxy, this machine) must not be able to lock each other
    out, and a token of at least 16 characters is not found by guessing.
    """
    address = connection.client.host if connection.client else ""
    delay_s = token_auth.retry_delay_s(address)
    if token_auth.accepts_token(address, secret):
        return
    if delay_s:
        abort(429, f"too many wrong tokens; try again in {delay_s:.0f} s")
    abort(401, "the token is wrong")


def _add_security_headers(send: Send, api: bool) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY_HEADERS)
            headers.setdefault("cache-control", "no-store" if api else "no-cache")
        await send(message)

    return send_with_headers


def _limit_body(receive: Receive, limit: int) -> Receive:
    """Limit the size of a body of undeclared length, and the time that it may take.

    The next part must arrive in time, and all parts at MIN_BODY_BYTES_PER_S on average: a byte a
    minute would otherwise hold a connection for years.
    """
    received_bytes = 0
    ended = False
    started = time.monotonic()

    async def read() -> Message:
        nonlocal received_bytes, ended
        if ended:
            return await receive()
        allowed_s = BODY_CHUNK_TIMEOUT_S + received_bytes / MIN_BODY_BYTES_PER_S
        left_s = min(BODY_CHUNK_TIMEOUT_S, started + allowed_s - time.monotonic())
        try:
            message = await asyncio.wait_for(receive(), max(0.001, left_s))
        except asyncio.TimeoutError as error:
            raise HTTPException(408, "the rest of the body did not arrive in time") from error
        received_bytes += len(message.get("body", b""))
        ended = not message.get("more_body", False)
        if received_bytes > limit:
            raise HTTPException(413, f"the body is too large; at most {limit} bytes are allowed")
        return message

    return read
