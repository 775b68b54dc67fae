"""The dataset routes: what a browser sends and is told."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from simpletuner.server.api import datasets as routes
from simpletuner.server.uploads import INCOMING_FOLDER
from tests.server.dataset_app import OTHER_PNG, PNG, make_client, make_workspace
from tests.unicode_names import needs_unicode_names

P = "/api/v1"
OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture
def web(tmp_path: Path) -> TestClient:
    web = make_client(make_workspace(tmp_path / "w"))
    assert web.post(f"{P}/datasets", json={"name": "photos"}).status_code == 201
    return web


def put(web: TestClient, file: str, data: bytes, name: str = "photos") -> tuple[int, dict]:
    answer = web.put(f"{P}/datasets/{name}/files/{file}", content=data, headers=OCTETS)
    return answer.status_code, answer.json()


def said(body: dict) -> str:
    assert set(body) == {"detail"}
    return " ".join(one["message"] for one in body["detail"])


def held(web: TestClient) -> tuple[int, int]:
    """Pictures, and those with a caption, as soon as an upload was answered."""
    info = web.get(f"{P}/datasets/photos").json()
    return info["pictures"], info["captioned"]


def test_from_nothing_to_captioned_pictures(web: TestClient) -> None:
    status, body = put(web, "cats/a%20b.png", PNG)
    assert (status, body["saved"], body["refused"]) == (200, ["cats/a b.png"], [])
    assert held(web) == (1, 0)
    assert put(web, "cats/a%20b.txt", b"a red field")[0] == 200
    assert held(web) == (1, 1)
    page = web.get(
        f"{P}/datasets/photos/items", params={"resolution": 512, "crop_aspect": "square"}
    ).json()
    (item,) = page["items"]
    assert (item["file"], item["captions"], item["bucket_px"]) == (
        "cats/a b.png",
        ["a red field"],
        [512, 512],
    )
    assert item["crop_px"] == [16, 0, 64, 64]
    answer = web.put(
        f"{P}/datasets/photos/captions/cats/a%20b.png",
        json={"text": "red", "before": "a red field"},
    )
    assert answer.json()["items"][0]["captions"] == ["red"]
    answer = web.put(
        f"{P}/datasets/photos/captions/cats/a%20b.png", json={"text": "x", "before": "a red field"}
    )
    assert answer.status_code == 409
    assert web.get(f"{P}/datasets/photos/buckets").json() == [
        {"width_px": 1280, "height_px": 832, "pictures": 1}
    ]
    assert [one["name"] for one in web.get(f"{P}/datasets").json()] == ["photos"]
    assert web.get(f"{P}/datasets/photos").json()["captioned"] == 1


def test_pictures_are_sent_whole_and_small(web: TestClient) -> None:
    put(web, "a.png", PNG)
    whole = web.get(f"{P}/datasets/photos/files/a.png")
    assert (whole.content, whole.headers["content-type"]) == (PNG, "image/png")
    small = web.get(f"{P}/datasets/photos/files/a.png", params={"width": 50})
    assert small.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(small.content)).size == (96, 64)
    for file in (
        "none.png",
        "a.txt",
        "..%2f..%2fa.png",
        "%2e%2e/%2e%2e/x",
        "a.png%00",
        "%2fetc%2fpasswd",
    ):
        for params in ({}, {"width": 96}):
            assert web.get(f"{P}/datasets/photos/files/{file}", params=params).status_code == 404


def test_refusals_say_what_is_wrong(web: TestClient) -> None:
    put(web, "a.png", PNG)
    for file, data, status, word in [
        ("a.png", OTHER_PNG, 409, "rename"),
        ("b.png", b"<html>", 415, "is a web page, not an image"),
        ("b.svg", b"<svg/>", 415, ".svg"),
        ("%2e%2e%2fb.png", PNG, 422, "leads out"),
        ("c.zip", b"PK", 415, "archive"),
    ]:
        got, body = put(web, file, data)
        assert got == status
        assert word in said(body)
    assert put(web, "a.png", PNG, "none")[0] == 404
    assert web.get(f"{P}/datasets/none").status_code == 404
    assert put(web, "a.png", PNG, "..")[0] in (404, 405)
    for query in (
        "resolution=0",
        "resolution=nan",
        "resolution_type=inch",
        "crop_style=face",
        "offset=-1",
        "limit=0",
        "limit=201",
        "only=bad",
        "seed=-1",
    ):
        assert web.get(f"{P}/datasets/photos/items?{query}").status_code == 422, query
    for name in ("photos", "a/b", ".x", "x" * 65):
        assert web.post(f"{P}/datasets", json={"name": name}).status_code in (409, 422)
    assert web.post(f"{P}/datasets", json={"name": "x", "path": "/etc"}).status_code == 404
    assert web.get(f"{P}/folders", params={"path": "/etc"}).status_code == 404


def test_an_archive_says_what_it_held(web: TestClient) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(30):
            archive.writestr(f"set/{number}.png", PNG)
            archive.writestr(f"set/{number}.txt", f"picture {number}")
        archive.writestr("../evil.png", PNG)
    status, body = put(web, "all.zip", out.getvalue())
    assert status == 200
    assert len(body["saved"]) == 60
    assert [one["file"] for one in body["refused"]] == ["../evil.png"]
    assert held(web) == (30, 30)


def test_a_body_above_the_limit(tmp_path: Path) -> None:
    where = make_workspace(tmp_path / "w")
    web = make_client(where, max_upload_bytes=len(PNG) - 1)
    web.post(f"{P}/datasets", json={"name": "photos"})
    assert put(web, "a.png", PNG)[0] == 413

    answer = web.put(
        f"{P}/datasets/photos/files/a.png", content=(PNG for _ in range(2)), headers=OCTETS
    )
    assert answer.status_code == 413
    assert list((where.datasets_dir / "photos" / INCOMING_FOLDER).iterdir()) == []


@needs_unicode_names
def test_the_other_spelling_of_a_name_is_the_same_file(web: TestClient, tmp_path: Path) -> None:
    folder = tmp_path / "w" / "datasets" / "photos"
    for file, data in (("e\u0301.png", PNG), ("e\u0301.txt", b"said")):
        (folder / file).write_bytes(data)
    assert web.get(f"{P}/datasets/photos").json()["captioned"] == 1
    for file, data in (("%C3%A9.png", PNG), ("%C3%A9.txt", b"said")):
        assert put(web, file, data)[0] == 200
        assert held(web) == (1, 1)
    assert len([path for path in folder.iterdir() if path.is_file()]) == 2


def test_only_into_the_workspace(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    web = make_client(make_workspace(tmp_path / "w", tmp_path / "mine"))
    answer = web.post(f"{P}/datasets", json={"name": "mine", "path": str(tmp_path / "mine")})
    assert (answer.status_code, answer.json()["owned"]) == (201, False)
    assert put(web, "a.png", PNG, "mine")[0] == 409
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_upload_that_is_cut_off_leaves_nothing(web: TestClient, tmp_path: Path) -> None:
    """As the server sees it: half of the body, then the client is gone."""
    messages = iter(
        [{"type": "http.request", "body": PNG[:30], "more_body": True}, {"type": "http.disconnect"}]
    )
    answers: list[dict] = []

    async def receive() -> dict:
        return next(messages)

    async def send(message: dict) -> None:
        answers.append(message)

    path = f"{P}/datasets/photos/files/a.png"
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "PUT",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-length", b"1000"), (b"content-type", b"application/octet-stream")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    asyncio.run(web.app(scope, receive, send))
    assert answers[0]["status"] == 400
    files = [path for path in (tmp_path / "w" / "datasets").rglob("*") if path.is_file()]
    assert files == []


def test_many_pieces_are_gathered_before_they_are_written(
    web: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "BLOCK_BYTES", 64)
    pieces = [PNG[at : at + 7] for at in range(0, len(PNG), 7)]
    answer = web.put(f"{P}/datasets/photos/files/a.png", content=iter(pieces), headers=OCTETS)
    assert answer.status_code == 200
    assert web.get(f"{P}/datasets/photos/files/a.png").content == PNG


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    where = make_workspace(tmp_path)
    (where.datasets_dir / "photos").mkdir(parents=True)
    (where.datasets_dir / "photos" / "a.png").write_bytes(PNG)

    def full(path: Path, text: str) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("simpletuner.server.caption_files.write_atomically", full)
    asked = make_client(where)
    answer = asked.put("/api/v1/datasets/photos/captions/a.png", json={"text": "x", "before": None})
    assert answer.status_code == 507
    (told,) = answer.json()["detail"]
    assert os.strerror(code) in told["message"]
    assert "a.txt" in told["message"]
    assert str(tmp_path) not in told["message"]
    monkeypatch.setattr("simpletuner.server.thumbnails.write_atomically", full)
    assert asked.get("/api/v1/datasets/photos/files/a.png?width=96").status_code == 200
