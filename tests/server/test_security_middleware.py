"""Attacks on the server, each with the answer it gets. Host names and tokens are invented."""

from __future__ import annotations

import asyncio
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.requests import HTTPConnection
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from simpletuner.errors import ConfigError
from simpletuner.server import security_middleware
from simpletuner.server.app import ROUTE_MODULES, create_app
from simpletuner.server.file_responses import make_file_response
from simpletuner.server.security_middleware import SECURITY_HEADERS, SecurityMiddleware
from simpletuner.server.settings import ServerSettings
from simpletuner.server.token_auth import (
    FREE_ATTEMPTS,
    MAX_RETRY_DELAY_S,
    TokenAuth,
    read_or_create_secret,
)
from simpletuner.server.workspace import Workspace

HERE = "http://localhost:8001"
TOKEN = "a-token-of-thirty-two-characters"
JSON = {"content-type": "application/json"}
EVIL = "http://evil.example"


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    """Lets everybody in; what it is asked, the guard has let through."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


def guarded(tmp_path: Path, gate: TokenAuth | None = None, **settings: Any) -> TestClient:
    return TestClient(
        SecurityMiddleware(plain, ServerSettings(Workspace(tmp_path), **settings), gate),
        base_url=HERE,
    )


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return guarded(tmp_path)


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    return create_app(ServerSettings(Workspace(tmp_path), static_dir=tmp_path / "none"))


@pytest.fixture
def closed(tmp_path: Path) -> FastAPI:
    return create_app(
        ServerSettings(Workspace(tmp_path), token=TOKEN, static_dir=tmp_path / "none")
    )


# ---- which name it was asked by: DNS rebinding


@pytest.mark.parametrize(
    "host",
    [
        "localhost:8001",
        "localhost",
        "127.0.0.1:8001",
        "[::1]:8001",
        "LOCALHOST:9000",
        "127.0.0.1:1",
    ],
)
def test_own_names_are_answered_at_any_port(client: TestClient, host: str) -> None:
    assert client.get("/api/v1/system", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8001",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "testserver",
        "",
        "0.0.0.0:8001",
        "localhost:8001@evil.example",
        "evil.example/localhost",
        "localhost:",
        "192.168.1.5:8001",
        "[::1",
        "a b",
        "localhost.",
        "127.0.0.2",
        "[::1]:8001:8001",
        "localhost:999999",
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/v1/system"])
def test_foreign_names_are_not(client: TestClient, host: str, path: str) -> None:
    assert client.get(path, headers={"host": host}).status_code == 403


def test_two_hosts_are_refused(client: TestClient) -> None:
    headers = [("host", "localhost:8001"), ("host", "evil.example")]
    assert client.get("/", headers=headers).status_code in (400, 403)  # type: ignore[arg-type]


def test_listening_everywhere_takes_addresses_but_no_foreign_name(tmp_path: Path) -> None:
    client = guarded(tmp_path, host="0.0.0.0", token=TOKEN)
    assert client.get("/", headers={"host": "192.168.1.5:8001"}).status_code == 200
    assert client.get("/", headers={"host": "[fd00::5]:8001"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example:8001"}).status_code == 403


def test_the_name_of_a_proxy_can_be_added(tmp_path: Path) -> None:
    client = guarded(tmp_path, allowed_hosts=("Box.Example",), token=TOKEN)
    headers = {"host": "box.example", "origin": "https://box.example"}
    assert client.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "settings", [{"host": "0.0.0.0"}, {"host": "192.168.1.5"}, {"allowed_hosts": ("a.example",)}]
)
def test_no_server_for_others_without_a_token(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="token"):
        create_app(ServerSettings(Workspace(tmp_path), **settings))


# ---- requests that a page of another site makes through the visitor's browser

FOREIGN = [
    {"origin": EVIL},
    {"origin": "null"},
    {"origin": "http://localhost:9999"},
    {"origin": "http://localhost"},
    {"origin": "http://localhost:8001.evil.example"},
    {"origin": "http://evil-localhost:8001"},
    {"origin": "ws://localhost:8001"},
    {"origin": "file://"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
    {"sec-fetch-site": "nonsense"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
@pytest.mark.parametrize("path", ["/api/v1/queue", "/"])
def test_foreign_pages_get_nothing(
    client: TestClient, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = client.request(method, path, headers={**JSON, **headers})
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_foreign_pages_get_no_web_socket(client: TestClient, headers: dict[str, str]) -> None:
    with (
        pytest.raises(WebSocketDisconnect) as raised,
        client.websocket_connect("/live", headers=headers),
    ):
        pass
    assert raised.value.code == 1008


@pytest.mark.parametrize("host", ["evil.example", "testserver"])
def test_foreign_names_get_no_web_socket(client: TestClient, host: str) -> None:
    with (
        pytest.raises(WebSocketDisconnect) as raised,
        client.websocket_connect("/live", headers={"host": host}),
    ):
        pass
    assert raised.value.code == 1008


@pytest.mark.parametrize(
    "headers",
    [{}, {"origin": HERE}, {"origin": "https://localhost:8001"}, {"sec-fetch-site": "same-origin"}],
)
def test_own_pages_and_programs_get_in(client: TestClient, headers: dict[str, str]) -> None:
    own = {"host": "localhost:8001", **headers}
    assert client.post("/api/v1/queue", headers={**own, **JSON}).status_code == 200
    with client.websocket_connect("/live", headers=own):
        pass


def test_a_link_from_elsewhere_leads_to_the_front_page_only(client: TestClient) -> None:
    link = {
        "sec-fetch-site": "cross-site",
        "sec-fetch-mode": "navigate",
        "sec-fetch-dest": "document",
    }
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/api/v1/system", headers=link).status_code == 403
    assert client.post("/", headers={**link, **JSON}).status_code == 403


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        "text/json",
        "application/octet-stream",
        "application/json-patch+json",
    ],
)
def test_only_json_is_taken(client: TestClient, method: str, kind: str) -> None:
    answer = client.request(method, "/api/v1/queue", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415


def test_what_is_taken(client: TestClient) -> None:
    charset = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/api/v1/queue", content=b"{}", headers=charset).status_code == 200
    octets = {"content-type": "application/octet-stream"}
    upload = "/api/v1/datasets/photos/files/a.png"
    assert client.put(upload, content=b"x", headers=octets).status_code == 200
    assert client.put(upload, content=b"x", headers=JSON).status_code == 415
    assert client.post(upload, content=b"x", headers=octets).status_code == 415
    assert client.delete("/api/v1/jobs/0123456789ab").status_code == 200


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PATCH", "OPTIONS", "PROPFIND"])
def test_other_methods(client: TestClient, method: str) -> None:
    assert client.request(method, "/api/v1/queue").status_code == 405


# ---- too much


def test_bodies_have_an_end(tmp_path: Path) -> None:
    client = guarded(tmp_path, max_json_bytes=1000, max_upload_bytes=5000)
    octets = {"content-type": "application/octet-stream"}
    assert client.put("/api/v1/queue", content=b"x" * 1000, headers=JSON).status_code == 200
    assert client.put("/api/v1/queue", content=b"x" * 1001, headers=JSON).status_code == 413
    upload = "/api/v1/datasets/photos/files/a.png"
    assert client.put(upload, content=b"x" * 5000, headers=octets).status_code == 200
    assert client.put(upload, content=b"x" * 5001, headers=octets).status_code == 413
    assert client.request("GET", "/", content=b"x" * 1001).status_code == 413


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "٣"])
def test_lengths_that_are_none(client: TestClient, length: str) -> None:
    headers = {**JSON, "content-length": length.encode()}
    assert client.request("GET", "/", headers=headers).status_code == 400  # type: ignore[arg-type]


def test_a_body_that_hides_its_length_is_cut_off(tmp_path: Path) -> None:
    app = create_app(ServerSettings(Workspace(tmp_path), max_json_bytes=1000))
    taken = 0

    @app.post("/api/v1/count")
    async def count(request: Request) -> int:
        return len(await request.body())

    app.router.routes.insert(0, app.router.routes.pop())

    def parts() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(100):
            taken += 100
            yield b"x" * 100

    answer = TestClient(app, base_url=HERE).post("/api/v1/count", content=parts(), headers=JSON)
    assert answer.status_code == 413
    assert "1000 bytes" in answer.json()["detail"][0]["message"]


def test_a_body_that_never_ends_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, app: FastAPI
) -> None:
    monkeypatch.setattr(security_middleware, "BODY_CHUNK_TIMEOUT_S", 0.05)
    told: list[Any] = []

    async def silence() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        told.append(message)

    headers = [
        (b"host", b"localhost"),
        (b"content-type", b"application/json"),
        (b"content-length", b"9"),
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/api/v1/login",
        "raw_path": b"/api/v1/login",
        "query_string": b"",
        "headers": headers,
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
        "server": ("localhost", 8001),
        "client": ("127.0.0.1", 1),
    }
    asyncio.run(app(scope, silence, send))
    assert told[0]["status"] == 408


# ---- what every answer carries


@pytest.mark.parametrize(
    "failure", [RuntimeError("secret of the inside"), OSError(5, "Input/output error", "/secret")]
)
def test_headers_of_every_answer(app: FastAPI, failure: Exception) -> None:
    @app.get("/api/v1/broken")
    def broken() -> None:
        raise failure

    app.router.routes.insert(0, app.router.routes.pop())
    client = TestClient(app, base_url=HERE, raise_server_exceptions=False)
    answers = {
        200: client.get("/api/v1/system"),
        403: client.get("/", headers={"host": "evil.example"}),
        404: client.get("/api/v1/nothing"),
        413: client.post("/api/v1/login", content=b"x" * (1 << 21), headers=JSON),
        415: client.post("/api/v1/login", content=b"x"),
        422: client.post("/api/v1/login", json={"tokn": 1}),
        500: client.get("/api/v1/broken"),
        503: client.get("/"),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert answer.headers["cache-control"] == (
            "no-cache" if answer.request.url.path == "/" else "no-store"
        )
        assert not [name for name in answer.headers if name.startswith("access-control")]
        if status != 503 and status != 200:
            assert set(answer.json()) == {"detail"}
    assert "secret" not in answers[500].text


def test_the_policy_allows_no_inline_no_eval_no_frame_no_other_host() -> None:
    policy = dict(
        part.strip().split(" ", 1)
        for part in SECURITY_HEADERS["content-security-policy"].split(";")
    )
    assert policy["default-src"] == policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["object-src"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in SECURITY_HEADERS["content-security-policy"]
    assert "http" not in SECURITY_HEADERS["content-security-policy"]
    assert SECURITY_HEADERS["x-frame-options"] == "DENY"
    assert SECURITY_HEADERS["x-content-type-options"] == "nosniff"
    assert SECURITY_HEADERS["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "name", ["a.svg", "a.html", "a.htm", "a.xhtml", "a.js", "a.pdf", "a", "a.png.html"]
)
def test_what_a_browser_could_run_is_a_download(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("<script>alert(1)</script>")
    answer = make_file_response(tmp_path / name)
    assert answer.media_type == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.PNG", "image/png"),
        ("a.jpeg", "image/jpeg"),
        ("a.json", "text/plain; charset=utf-8"),
        ("train.log", "text/plain; charset=utf-8"),
    ],
)
def test_pictures_and_text_are_shown(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("x")
    assert make_file_response(tmp_path / name).media_type == kind
    assert (
        make_file_response(tmp_path / name, name)
        .headers["content-disposition"]
        .startswith("attachment")
    )


# ---- the token


def routes(app: FastAPI) -> list[tuple[set[str] | None, str]]:
    """Return the methods (None: WebSocket) and a valid path of all API routes except the login."""
    included = [route for module in ROUTE_MODULES for route in module.router.routes]
    own = [route for route in app.routes if isinstance(route, (Route, WebSocketRoute))]
    found = {}
    for route in [*included, *own]:
        assert isinstance(route, (Route, WebSocketRoute))
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        methods = route.methods if isinstance(route, Route) else None
        found[route.path, str(methods)] = (methods, path)
    assert set(app.openapi()["paths"]) <= {re.sub(r":\w+\}", "}", path) for path, _ in found}
    return [
        pair
        for pair in found.values()
        if pair[1].startswith("/api/") and pair[1] != security_middleware.LOGIN_PATH
    ]


def test_every_route_wants_the_token(closed: FastAPI) -> None:
    client = TestClient(closed, base_url=HERE)
    for methods, path in routes(closed):
        if methods is None:
            local = {"host": "localhost"}
            with pytest.raises(WebSocketDisconnect), client.websocket_connect(path, headers=local):
                pass
        for method in methods or ():
            upload = method == "PUT" and security_middleware.UPLOAD_PATH.fullmatch(path)
            kind = "application/octet-stream" if upload else "application/json"
            for headers in ({}, {"authorization": "Bearer "}, {"cookie": "simpletuner-8001=x"}):
                answer = client.request(method, path, headers={**headers, "content-type": kind})
                assert answer.status_code in (401, 429), (method, path)
                closed.state.token_auth.failed_attempts.clear()


def test_pages_need_no_token_but_hold_nothing(closed: FastAPI) -> None:
    assert TestClient(closed, base_url=HERE).get("/").status_code == 503


def test_logging_in_gives_a_cookie_that_scripts_cannot_read(closed: FastAPI) -> None:
    client = TestClient(closed, base_url=HERE)
    answer = client.post("/api/v1/login", json={"token": TOKEN})
    assert answer.status_code == 204
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert TOKEN not in cookie
    assert client.get("/api/v1/system").status_code == 200
    assert TestClient(closed, base_url=HERE).get("/api/v1/system").status_code == 401


def test_the_cookie_outlives_the_server_but_not_the_token(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    first = TestClient(create_app(ServerSettings(place, token=TOKEN)), base_url=HERE)
    first.post("/api/v1/login", json={"token": TOKEN})
    again = TestClient(
        create_app(ServerSettings(place, token=TOKEN)), base_url=HERE, cookies=first.cookies
    )
    assert again.get("/api/v1/system").status_code == 200
    other = TestClient(
        create_app(ServerSettings(place, token="another" + TOKEN)),
        base_url=HERE,
        cookies=first.cookies,
    )
    assert other.get("/api/v1/system").status_code == 401


def test_bearer(closed: FastAPI) -> None:
    client = TestClient(closed, base_url=HERE)
    assert (
        client.get("/api/v1/system", headers={"authorization": f"Bearer {TOKEN}"}).status_code
        == 200
    )
    assert (
        client.get("/api/v1/system", headers={"authorization": f"Bearer {TOKEN}x"}).status_code
        == 401
    )
    assert (
        client.get("/api/v1/system", headers={"authorization": f"Basic {TOKEN}"}).status_code == 401
    )
    assert client.get("/api/v1/system", params={"token": TOKEN}).status_code == 401


def test_the_launch_word_opens_once(closed: FastAPI) -> None:
    word = closed.state.token_auth.login_code
    client = TestClient(closed, base_url=HERE)
    assert client.post("/api/v1/login", json={"token": word}).status_code == 204
    assert client.post("/api/v1/login", json={"token": word}).status_code == 401
    assert client.get("/api/v1/system").status_code == 200


def test_guessing_is_made_to_wait(closed: FastAPI) -> None:
    client = TestClient(closed, base_url=HERE)
    guesses = [
        client.post("/api/v1/login", json={"token": f"wrong {n}"}).status_code for n in range(12)
    ]
    assert guesses == [401] * FREE_ATTEMPTS + [429] * 2
    other = TestClient(closed, base_url=HERE)
    wrong = other.get("/api/v1/system", headers={"authorization": "Bearer wrong"})
    assert wrong.status_code == 429


def test_guessing_never_locks_out_the_right_token(closed: FastAPI) -> None:
    client = TestClient(closed, base_url=HERE)
    for number in range(12):
        client.post("/api/v1/login", json={"token": f"wrong {number}"})
    right = client.get("/api/v1/system", headers={"authorization": f"Bearer {TOKEN}"})
    assert right.status_code == 200
    assert client.post("/api/v1/login", json={"token": TOKEN}).status_code == 204


def test_who_has_logged_in_is_not_kept_out_by_who_guesses(closed: FastAPI) -> None:
    client = TestClient(closed, base_url=HERE)
    client.post("/api/v1/login", json={"token": TOKEN})
    guesser = TestClient(closed, base_url=HERE)
    for n in range(12):
        guesser.post("/api/v1/login", json={"token": f"wrong {n}"})
    assert client.get("/api/v1/system").status_code == 200


def test_the_pause_grows_to_a_bound_and_ends() -> None:
    now = [0.0]
    gate = TokenAuth(TOKEN, "key", clock=lambda: now[0])
    pauses = []
    for _ in range(25):
        now[0] += gate.retry_delay_s("a")
        assert gate.retry_delay_s("a") == 0
        gate.accepts_token("a", "wrong")
        pauses.append(gate.retry_delay_s("a"))
    assert pauses[: FREE_ATTEMPTS - 1] == [0.0] * (FREE_ATTEMPTS - 1)
    grown = pauses[FREE_ATTEMPTS - 1 :]
    assert grown == sorted(grown)
    assert grown[0] > 0
    assert grown[-1] == MAX_RETRY_DELAY_S
    assert gate.retry_delay_s("b") == 0
    now[0] += MAX_RETRY_DELAY_S
    assert gate.accepts_token("a", TOKEN)
    assert gate.retry_delay_s("a") == 0
    for n in range(5000):
        gate.accepts_token(f"address {n}", "wrong")
    assert len(gate.failed_attempts) <= 1024


def test_secrets_are_256_bit_and_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "own" / "token"
    token = read_or_create_secret(path)
    assert len(token) == 43
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_or_create_secret(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert read_or_create_secret(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("\n")
    assert len(read_or_create_secret(path)) == 43
    assert read_or_create_secret(tmp_path / "other") != token


def test_tokens_are_compared_in_constant_time() -> None:
    source = (
        Path(security_middleware.__file__).with_name("token_auth.py").read_text(encoding="utf-8")
    )
    assert source.count("compare_digest") == 3
    assert " == self" not in source


def test_the_address_of_a_try_is_the_connection_s(tmp_path: Path) -> None:
    """A header cannot give a guesser a new address."""
    gate = TokenAuth(TOKEN, "key")
    client = guarded(tmp_path, gate, token=TOKEN)
    for n in range(12):
        headers = {"authorization": "Bearer wrong", "x-forwarded-for": f"10.0.0.{n}"}
        answer = client.get("/api/v1/system", headers=headers)
    assert answer.status_code == 429
    assert len(gate.failed_attempts) == 1


def test_a_connection_without_headers_is_refused(tmp_path: Path) -> None:
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    with pytest.raises(security_middleware.ApiError) as raised:
        SecurityMiddleware(plain, ServerSettings(Workspace(tmp_path)), None).check_request(
            HTTPConnection(scope), "GET"
        )
    assert raised.value.status == 403
