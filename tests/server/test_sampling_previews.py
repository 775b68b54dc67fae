"""The rough preview of images that are being sampled, as the pages of a run and of a job show it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from websockets.sync.client import connect

from simpletuner.server import live_broadcaster, run_finder
from simpletuner.server.run_service import RunService
from simpletuner.server.sampling_previews import make_preview_response
from simpletuner.server.schemas.generations import GenerationRequest
from simpletuner.server.schemas.live import FollowRequest
from simpletuner.server.workspace import Workspace, run_id
from tests.server.run_folder_writer import RunFolderWriter, make_runs_app
from tests.server.test_generations import Bench
from tests.server.test_live_broadcaster import Page, serving


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_broadcaster, "POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr(run_finder, "RESCAN_INTERVAL_S", 0.0)


def test_a_preview_is_announced_whenever_it_changes(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    preview = run.path / "images" / "preview.jpg"
    preview.parent.mkdir()
    preview.write_bytes(b"first")
    app = make_runs_app(tmp_path)
    route = f"/api/v1/runs/{run_id(run.path)}/preview"
    with run.hold_lock(), serving(app) as address, connect(address) as connection:
        lock_s = (run.path / "run.lock").stat().st_mtime
        os.utime(preview, (lock_s + 1, lock_s + 1))
        page = Page(connection, run_id(run.path))
        page.hear()
        page.until(lambda page: page.messages[-1].preview == int(lock_s + 1) * 1000)
        page.rest()
        os.utime(preview, (lock_s + 2, lock_s + 2))
        assert page.hear().preview == int(lock_s + 2) * 1000
        with TestClient(app) as client:
            answer = client.get(route)
            assert (answer.headers["content-type"], answer.content) == ("image/jpeg", b"first")
        os.utime(preview, (lock_s - 1, lock_s - 1))  # left by a process that was killed
        assert page.hear().preview is None
        os.utime(preview, (lock_s + 3, lock_s + 3))
        assert page.hear().preview == int(lock_s + 3) * 1000
        preview.unlink()
        assert page.hear().preview is None
        page.rest()


def test_a_preview_is_announced_again_to_a_page_that_comes_back(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    (run.path / "images").mkdir()
    (run.path / "images" / "preview.jpg").write_bytes(b"a preview")
    with (
        run.hold_lock(),
        serving(make_runs_app(tmp_path)) as address,
        connect(address) as connection,
    ):
        page = Page(connection, run_id(run.path))
        page.hear()
        page.until(lambda page: page.messages[-1].preview)
        connection.send(FollowRequest().model_dump_json())
        page.rest()
        follow = FollowRequest(run=run_id(run.path), since=page.since)
        connection.send(follow.model_dump_json())
        page.messages.clear()
        page.hear()
        page.until(lambda page: page.messages[-1].preview)


def test_a_preview_without_a_process_is_none(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    run.write_exit()
    route = f"/api/v1/runs/{run_id(run.path)}/preview"
    (run.path / "images").mkdir()
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    service = RunService(Workspace(tmp_path))
    with TestClient(make_runs_app(tmp_path)) as client:
        assert client.get(route).status_code == 204
        preview = run.path / "images" / "preview.jpg"
        preview.write_bytes(b"left")
        reader = service.find_reader(run_id(run.path))
        assert reader is not None
        reader.refresh()
        assert reader.preview_version() is None
        preview.unlink()
        preview.symlink_to(secret)  # leads out of the run's folder
        assert client.get(route).status_code == 404
        assert client.get("/api/v1/runs/000000000000/preview").status_code == 404


def test_a_generation_has_a_preview_while_it_is_generated(tmp_path: Path) -> None:
    bench = Bench(tmp_path.resolve())
    made = bench.generations.create(GenerationRequest(prompts=["a fox"], flavour="nano"))
    assert made.job is not None
    folder = bench.workspace.root / "generations" / made.id
    assert "--preview" in (folder / "command.json").read_text()
    path = bench.generations.file_path(made.id, "preview.jpg")
    path.write_bytes(b"a preview")
    assert bench.generations.get(made.id).preview is None  # it waits in the queue
    lock = bench.harness.jobs._job_folder(made.job.id).take_lock()
    try:
        (folder / "state.json").write_text('{"state": "running"}')
        os.utime(path, (5, 5))
        assert bench.generations.get(made.id).preview == 5000
        assert make_preview_response(path).body == b"a preview"
        assert bench.generations.get(made.id).images == []
        (folder / "state.json").write_text('{"state": "failed", "message": ""}')
        assert bench.generations.get(made.id).preview is None
    finally:
        os.close(lock)


def test_a_large_file_is_no_preview(tmp_path: Path) -> None:
    (tmp_path / "preview.jpg").write_bytes(bytes((1 << 20) + 1))
    assert make_preview_response(tmp_path / "preview.jpg").status_code == 204
