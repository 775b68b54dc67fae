"""GET requests change nothing, reveal no secret and reach nothing outside the workspace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.routing import Route
from starlette.testclient import TestClient

from simpletuner.server.app import ROUTE_MODULES, create_app
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace
from tests.server.run_folder_writer import RunFolderWriter

HERE = "http://localhost:8001"
CANARY = "hf_canary0123456789"
# The server's own memory of what it read: made again whenever it is gone.
DERIVED = (".simpletuner/thumbs", ".simpletuner/datasets/")
OUTSIDE = [
    "../secret.png",
    "..%2fsecret.png",
    "%2e%2e%2fsecret.png",
    "%252e%252e%252fsecret.png",
    "..%5csecret.png",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "a.png%00",
    "link.png",
    "folder/secret.png",
    "C:%5cwindows%5cwin.ini",
    "%5c%5chost%5cshare%5ca.png",
    "../../../../../../etc/passwd",
    "windows/win.ini",
    "~/secret.png",
    "images/../../secret.png",
    "file:%2f%2f%2fetc%2fpasswd",
    "...%2f...%2fsecret.png",
    "%ff%fe.png",
    "a" * 5000,
]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("SIMPLETUNER_TOKEN", CANARY)
    (tmp_path / "outside").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside" / "secret.png")
    made = tmp_path / "workspace"
    photos = made / "datasets" / "photos"
    photos.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(photos / "a.png")
    (photos / "a.txt").write_text("a caption")
    run = made / "output" / "one"
    RunFolderWriter(run).write_start().write_steps(1, 3)
    (run / "train.log").write_text("a line\n")
    for folder in (photos, run):
        (folder / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
        (folder / "folder").symlink_to(tmp_path / "outside")
    return made


@pytest.fixture
def app(workspace: Path) -> FastAPI:
    static = workspace.parent / "static"
    static.mkdir()
    (static / "index.html").write_text("pages")
    return create_app(ServerSettings(Workspace(workspace), static_dir=static))


def kept(workspace: Path) -> dict[str, tuple[int, bytes]]:
    """Everything but what is derived."""
    found = {}
    for path in sorted(workspace.parent.rglob("*")):
        name = path.relative_to(workspace).as_posix() if workspace in path.parents else path.name
        if path.is_file() and not name.startswith(DERIVED):
            found[name] = (path.stat().st_mtime_ns, path.read_bytes())
    return found


def test_reading_changes_nothing_and_tells_no_secret(app: FastAPI, workspace: Path) -> None:
    client = TestClient(app, base_url=HERE)
    run = client.get("/api/v1/runs").json()["runs"][0]["id"]
    draft = client.post("/api/v1/drafts", json={"name": "d", "config": {}, "datasets": []}).json()[
        "id"
    ]
    before = kept(workspace)
    asked = 0
    for route in (route for module in ROUTE_MODULES for route in module.router.routes):
        if not isinstance(route, Route) or "GET" not in (route.methods or ()):
            continue
        id = draft if "draft" in route.path else run
        for file in ("a.png", "config.json", "events.jsonl"):
            path = (
                route.path.replace("{id}", id)
                .replace("{name}", "photos")
                .replace("{path:path}", file)
            )
            answer = client.get(re.sub(r"\{[^}]*\}", "x", path))
            assert answer.status_code in (200, 204, 404, 422), (path, answer.text)
            assert CANARY not in answer.text
            asked += answer.status_code == 200
    assert asked > 20
    assert kept(workspace) == before


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: name[:40])
def test_no_path_leads_outside(app: FastAPI, workspace: Path, name: str) -> None:
    client = TestClient(app, base_url=HERE)
    run = client.get("/api/v1/runs").json()["runs"][0]["id"]
    own = client.get("/api/v1/datasets/photos/files/a.png")
    assert own.status_code == 200
    for path in (
        f"runs/{run}/files/{name}",
        f"datasets/photos/files/{name}",
        f"datasets/{name}/items",
    ):
        for query in ("", "?width=64"):
            answer = client.get(f"/api/v1/{path}{query}")
            assert answer.status_code in (404, 405, 422), (path, answer.status_code)
            assert answer.headers["content-type"].startswith("application/json")
            assert "root:" not in answer.text


@pytest.mark.parametrize(
    "path", ["/etc", "..", "../outside", "datasets/photos/folder", "~", "/", "\0"]
)
def test_folders_outside_are_not_listed(app: FastAPI, path: str) -> None:
    answer = TestClient(app, base_url=HERE).get("/api/v1/folders", params={"path": path})
    assert answer.status_code == 404
    assert "secret" not in answer.text
