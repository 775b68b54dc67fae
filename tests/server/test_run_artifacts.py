"""Files of a run: its own, as what they are, and no other file in the world."""

from __future__ import annotations

import asyncio
import os
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image

from simpletuner.server import file_reader
from simpletuner.server.run_artifacts import resolve_artifact
from simpletuner.server.run_service import RunService
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace, run_id
from tests.server.run_folder_writer import RunFolderWriter, make_runs_app

SECRET = b"CANARY: nobody may read this"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("files")
    run = RunFolderWriter(top / "workspace" / "output" / "zorbo").write_start().write_steps(1, 3)
    picture = BytesIO()
    Image.new("RGB", (400, 200), "red").save(picture, "PNG")
    run.write_image(3, picture.getvalue())
    run.write_checkpoint(500)
    (run.path / "pytorch_lora_weights.safetensors").write_bytes(bytes(range(200)))
    (run.path / "train.log").write_text("a line\nüber\n", encoding="utf-8")
    for name in ("x.svg", "x.html", "x.htm", "x.js", "x.png.html", "noname", "x.XHTML"):
        (run.path / name).write_text("<script>alert(1)</script>")
    (top / "secret.txt").write_bytes(SECRET)
    (top / "workspace" / "output" / "zorbo-secret").mkdir()
    (top / "workspace" / "output" / "zorbo-secret" / "x.txt").write_bytes(SECRET)
    (run.path / "out.txt").symlink_to(top / "secret.txt")
    (run.path / "up").symlink_to(top)
    (run.path / "checkpoint-7").symlink_to(top)
    (run.path / "loop").symlink_to("loop")
    (run.path / "inside.png").symlink_to(run.path / "images" / "step-000003" / "red-0-8x8.png")
    os.mkfifo(run.path / "pipe.png")
    return top / "workspace"


@pytest.fixture(scope="module")
def app(workspace: Path) -> FastAPI:
    return make_runs_app(workspace)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> TestClient:
    return TestClient(app, raise_server_exceptions=True)


@pytest.fixture(scope="module")
def files(workspace: Path) -> str:
    return f"/api/v1/runs/{run_id(workspace / 'output' / 'zorbo')}/files"


PICTURE = "images/step-000003/red-0-8x8.png"


def test_a_picture_and_a_smaller_one(client: TestClient, files: str, workspace: Path) -> None:
    whole = client.get(f"{files}/{PICTURE}")
    assert (whole.status_code, whole.headers["content-type"]) == (200, "image/png")
    assert "content-disposition" not in whole.headers
    assert whole.content == (workspace / "output" / "zorbo" / PICTURE).read_bytes()
    assert client.get(f"{files}/inside.png").content == whole.content
    small = client.get(f"{files}/{PICTURE}?width=100")
    assert small.headers["content-type"] == "image/jpeg"
    assert Image.open(BytesIO(small.content)).width < 400
    assert list((workspace / ".simpletuner" / "thumbs").glob("*.jpg"))
    assert client.get(f"{files}/train.log?width=100").status_code == 415
    assert client.get(f"{files}/{PICTURE}?width=0").status_code == 422


def test_ranges(client: TestClient, files: str) -> None:
    url = f"{files}/pytorch_lora_weights.safetensors"
    part = client.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
    assert part.headers["content-range"] == "bytes 10-19/200"
    assert client.get(url, headers={"Range": "bytes=-5"}).content == bytes(range(195, 200))
    assert client.get(url, headers={"Range": "bytes=200-"}).status_code == 416


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_lora_weights.safetensors",
        "x.svg",
        "x.html",
        "x.htm",
        "x.js",
        "x.png.html",
        "noname",
        "x.XHTML",
    ],
)
def test_what_a_browser_might_run_is_a_download(client: TestClient, files: str, name: str) -> None:
    answer = client.get(f"{files}/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize("name", ["train.log", "events.jsonl"])
def test_texts_are_plain(client: TestClient, files: str, name: str) -> None:
    answer = client.get(f"{files}/{name}")
    assert (answer.status_code, answer.headers["content-type"]) == (
        200,
        "text/plain; charset=utf-8",
    )


def test_a_checkpoint_is_its_lora(client: TestClient, files: str) -> None:
    answer = client.get(f"{files}/checkpoint-500")
    assert answer.content == b"lora 500"
    assert 'filename="zorbo-checkpoint-500.safetensors"' in answer.headers["content-disposition"]
    assert client.get(f"{files}/checkpoint-501").status_code == 404


def test_marks(client: TestClient, files: str, workspace: Path) -> None:
    url = files.replace("/files", "/checkpoints/{}/mark")
    folder = workspace / "output" / "zorbo"
    marked = client.put(url.format("checkpoint-500"), json={"marked": True})
    assert [one["marked"] for one in marked.json()["checkpoints"]] == [True]
    assert (folder / "checkpoint-500" / "keep").is_file()
    for _ in range(2):
        again = client.put(url.format("checkpoint-500"), json={"marked": False})
        assert [one["marked"] for one in again.json()["checkpoints"]] == [False]
    for name in (
        "checkpoint-7",
        "checkpoint-9",
        "images",
        "up",
        "..%2fzorbo",
        "%2e%2e",
        "checkpoint-500%00",
    ):
        assert client.put(url.format(name), json={"marked": True}).status_code == 404, name
    assert not list(workspace.parent.rglob("keep"))


async def asked(app: FastAPI, path: str) -> tuple[int, bytes]:
    """Past the client and its tidying of paths: what a server would hand on after decoding."""
    status, body = 0, b""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": b"",
        "headers": [],
        "scheme": "http",
        "server": ("testserver", 80),
        "client": ("127.0.0.1", 1),
        "root_path": "",
    }

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, body
        status, body = message.get("status", status), body + message.get("body", b"")

    await app(scope, receive, send)
    return status, body


PARTS = some.sampled_from(
    [
        "..",
        ".",
        "",
        "/",
        "\\",
        "..\\",
        "%2e%2e",
        "%2f",
        "%252e%252e",
        "\0",
        "C:",
        "//",
        "~",
        "up",
        "out.txt",
        "loop",
        "pipe.png",
        "secret.txt",
        "zorbo-secret",
        "zorbo",
        "output",
        "x.txt",
        "checkpoint-7",
        "checkpoint-500",
        "etc",
        "passwd",
        "file:",
        "\u2024\u2024",
        "x" * 300,
        "é",
        " ",
        "\ud800",
        "control",
    ]
)


@settings(deadline=None, max_examples=150)
@given(
    some.lists(PARTS | some.text(max_size=6), min_size=1, max_size=8), some.sampled_from(["/", ""])
)
def test_no_spelling_leads_out(
    workspace: Path, app: FastAPI, files: str, parts: list[str], glue: str
) -> None:
    """404 for everything but a file below the folder, named without a detour."""
    path = glue.join(parts)
    status, body = asyncio.run(asked(app, f"{files}/{path}"))
    assert SECRET not in body
    if status != 404:
        folder = workspace / "output" / "zorbo"
        assert status == 200
        assert (folder / path).is_file() or path == "checkpoint-500"
        assert not {"..", ".", ""} & set(path.split("/"))


@pytest.mark.parametrize(
    "path",
    [
        "../../../secret.txt",
        "/etc/passwd",
        "//etc/passwd",
        "up/secret.txt",
        "out.txt",
        "..\\..\\secret.txt",
        "images/../../../../secret.txt",
        "../zorbo-secret/x.txt",
        "../zorbo/train.log",
        "train.log/",
        "train.log/.",
        "train.log\0.png",
        "\0",
        "x" * 300,
        "/".join(["x" * 200] * 30),
        "C:\\windows\\win.ini",
        "images",
        "loop",
        "pipe.png",
        "",
        ".",
        "..",
        "checkpoint-7",
        "~/x",
        "\ud800",
    ],
)
def test_each_known_trick_is_answered_with_404(
    app: FastAPI, client: TestClient, files: str, path: str
) -> None:
    assert asyncio.run(asked(app, f"{files}/{path}"))[0] == 404
    encoded = quote(path.encode("utf-8", "surrogatepass"), safe="")
    dotted = encoded.replace(".", "%2e")  # a bare ".." is tidied by the client
    for spelling in (dotted, quote(dotted, safe="")):
        answer = client.get(f"{files}/{spelling}")
        assert answer.status_code == 404, spelling
        assert SECRET not in answer.content


@pytest.mark.parametrize("id", ["x", "..", "0" * 12, "%00", "é", "0" * 300])
def test_no_such_run(client: TestClient, id: str) -> None:
    for route in ("", "/metrics", "/pictures", "/log", "/files/train.log"):
        assert client.get(f"/api/v1/runs/{id}{route}").status_code == 404


def test_the_log_is_bounded(client: TestClient, files: str) -> None:
    url = files.replace("/files", "/log")
    assert client.get(f"{url}?since=7").json() == {
        "text": "über\n",
        "start": 7,
        "end": 13,
        "size": 13,
    }
    assert client.get(f"{url}?since=-6").json()["text"] == "über\n"
    for bad in ("limit=0", "limit=1048577", "since=x"):
        assert client.get(f"{url}?{bad}").status_code == 422
    assert client.get(f"{url}?since={10**40}").status_code in (200, 422)


def test_hidden_files_are_no_files_of_a_run(tmp_path: Path) -> None:
    """A workspace may be a run folder itself, and the token of the server lies in it."""
    RunFolderWriter(tmp_path).write_start()
    for name in (".simpletuner/token", ".env", "images/.secret.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("secret")
        with pytest.raises(PathOutsideWorkspace):
            resolve_artifact(Workspace(tmp_path), tmp_path, name)


@pytest.mark.parametrize("name", ["events.jsonl", "train.log", "exit.json", "config.json"])
def test_a_folder_in_the_place_of_a_file_takes_nothing_down(tmp_path: Path, name: str) -> None:
    folder = RunFolderWriter(tmp_path / "run").write_start().path
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    known = RunService(Workspace(tmp_path))
    known.detail(known.summaries()[0].id)
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert file_reader.read_lines(folder / name, 0).lines == []
    assert len(os.listdir("/proc/self/fd")) == open_files
