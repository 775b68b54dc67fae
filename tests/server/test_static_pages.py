"""The built pages, the page that says why there are none, and the list of routes."""

from __future__ import annotations

import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from simpletuner.server import openapi
from simpletuner.server.app import create_app
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace

HERE = "http://localhost:8001"


@pytest.fixture
def static(tmp_path: Path) -> Path:
    folder = tmp_path / "static"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><title>pages</title>")
    (folder / "assets" / "index-abc.js").write_text("let a = 1")
    return folder


@pytest.fixture
def client(tmp_path: Path, static: Path) -> TestClient:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    return TestClient(
        create_app(ServerSettings(Workspace(workspace), static_dir=static)), base_url=HERE
    )


def test_files_are_asked_for_again_but_not_sent_again(client: TestClient, static: Path) -> None:
    first = client.get("/")
    assert (first.status_code, first.text) == (200, "<!doctype html><title>pages</title>")
    assert first.headers["cache-control"] == "no-cache"
    same = {"if-none-match": first.headers["etag"]}
    assert client.get("/", headers=same).status_code == 304
    (static / "index.html").write_text("<!doctype html><title>newer pages</title>")
    assert client.get("/", headers=same).status_code == 200
    script = client.get("/assets/index-abc.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert client.head("/").status_code == 200


def test_hashed_files_are_kept_and_sent_compressed(client: TestClient, static: Path) -> None:
    script = static / "assets" / "index-abc.js"
    script.with_name("index-abc.js.gz").write_bytes(gzip.compress(script.read_bytes()))
    packed = client.get("/assets/index-abc.js", headers={"accept-encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert packed.headers["content-type"].startswith("text/javascript")
    assert packed.text == script.read_text()
    plain = client.get("/assets/index-abc.js", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.text == script.read_text()
    same = {"accept-encoding": "gzip", "if-none-match": packed.headers["etag"]}
    assert client.get("/assets/index-abc.js", headers=same).status_code == 304


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e/secret.txt",
        "/%252e%252e%252fsecret.txt",
        "/..%5csecret.txt",
        "/assets/../../secret.txt",
        "/assets/%2e%2e/%2e%2e/secret.txt",
        "//etc/passwd",
        "/%2fetc/passwd",
        "/a%00.js",
        "/etc/passwd",
        "/C:/windows/win.ini",
        "/%5c%5chost%5cshare",
        "/windows/win.ini",
        "/link",
    ],
)
def test_nothing_beside_the_pages_is_sent(client: TestClient, static: Path, path: str) -> None:
    (static / "link").symlink_to(static.parent / "secret.txt")
    answer = client.get(path)
    assert answer.status_code == 404
    assert "secret" not in answer.text


@pytest.mark.parametrize("path", ["/nothing.js", "/api/v1/nothing", "/api/v2/runs", "/api/"])
def test_what_is_not_there(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["detail"][0]["message"]


def test_no_web_socket_but_the_live_one(client: TestClient) -> None:
    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("/x", headers={"host": "localhost"}),
    ):
        pass


def test_without_pages_the_remedy_is_told(tmp_path: Path) -> None:
    client = TestClient(
        create_app(ServerSettings(Workspace(tmp_path), static_dir=tmp_path / "none")), base_url=HERE
    )
    answer = client.get("/")
    assert answer.status_code == 503
    assert "pip install --force-reinstall --no-deps --no-cache-dir ." in answer.text
    assert client.get("/api/v1/system").status_code == 200
    assert client.get("/api/v1/nothing").status_code == 404


class Loads(HTMLParser):
    """What a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.anchors: set[str] = set()
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        inline = [name for name in given if name.startswith("on") or name in ("style", "src")]
        if tag in ("script", "style", "link", "img", "iframe") or inline:
            self.found.append(tag)
        self.anchors |= {given["id"] or ""} if "id" in given else set()
        self.targets |= {given["href"] or ""} if "href" in given else set()


def test_the_list_of_routes_loads_and_runs_nothing(client: TestClient) -> None:
    answer = client.get("/api/v1/docs")
    assert answer.status_code == 200
    page = Loads()
    page.feed(answer.text)
    assert page.found == []
    links = {target for target in page.targets if not target.startswith("#")}
    assert links == {"openapi.json"}
    assert {target[1:] for target in page.targets - links} <= page.anchors
    for path in client.get("/api/v1/openapi.json").json()["paths"]:
        assert path in answer.text
    assert client.get("/docs").status_code == 404
    assert client.get("/redoc").status_code == 404


def test_the_committed_document_is_the_application_s() -> None:
    """Mend it with: python -m simpletuner.server.openapi"""
    committed = openapi.OPENAPI_PATH.read_text(encoding="utf-8")
    assert json.loads(committed) == openapi.build_document()
    assert committed == openapi.render_document()


def test_the_document_knows_the_web_socket_s_messages_and_one_shape_of_refusal() -> None:
    document = openapi.build_document()
    shapes = document["components"]["schemas"]
    assert {"FollowRequest", "LiveUpdate", "ErrorResponse", "RunSummary"} <= set(shapes)
    assert "HTTPValidationError" not in shapes
    for methods in document["paths"].values():
        for route in methods.values():
            answer = route["responses"]["422"]["content"]["application/json"]["schema"]["$ref"]
            assert answer.endswith("/ErrorResponse")
    used = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert used <= set(shapes)
