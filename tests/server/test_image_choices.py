"""Images that are left out or cropped on the pages, and inspections of a dataset as jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from simpletuner.server.api import datasets, library
from simpletuner.server.api_errors import register_error_handlers
from simpletuner.server.schemas.configs import DraftWrite
from simpletuner.server.schemas.jobs import JobRequest
from simpletuner.server.services import Services
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace, run_id

API = "/api/v1/datasets/photos"
NANO = {"model_flavour": "nano", "device": "cpu"}


@pytest.fixture
def services(tmp_path: Path) -> Services:
    """A dataset of three images of 400 x 300 px; c has the shortest caption, b none."""
    folder = tmp_path / "datasets" / "photos"
    folder.mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (400, 300), (90, ord(name), 9)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a long caption")
    (folder / "c.txt").write_text("short")
    settings = ServerSettings(Workspace(tmp_path.resolve()), tool_command=("simpletuner",))
    return Services.from_settings(settings)


@pytest.fixture
def client(services: Services) -> TestClient:
    """The routes of datasets alone, which are made quickly."""
    app = FastAPI()
    app.state.services = services
    register_error_handlers(app)
    for module in (datasets, library):
        app.include_router(module.router)
    return TestClient(app)


def files(client: TestClient, **query: Any) -> list[str]:
    return [item["file"] for item in client.get(f"{API}/items", params=query).json()["items"]]


def exclude(client: TestClient, *names: str, excluded: bool = True) -> Any:
    answer = client.put(f"{API}/exclusions", json={"files": names, "excluded": excluded})
    assert answer.status_code == 200, answer.text
    return answer.json()


def job_datasets(services: Services, **fields: Any) -> Any:
    """Return the datasets that a job gets."""
    entry = {"id": "photos", "instance_data_dir": "datasets/photos", **fields}
    draft = services.drafts.create(
        DraftWrite(name="x", config={**NANO, "missing_caption": "empty"}, datasets=[entry])
    )
    job = services.jobs.enqueue(JobRequest(draft=draft.id))
    path = services.jobs.jobs_dir / job.id / "config" / "multidatabackend.json"
    return json.loads(path.read_text())[0]


def test_an_excluded_image_is_counted_apart_and_its_file_stays(
    services: Services, client: TestClient
) -> None:
    folder = services.workspace.datasets_dir / "photos"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    info = exclude(client, "b.png", "c.png")
    assert (info["pictures"], info["captioned"], info["excluded"]) == (3, 1, 2)
    assert files(client, only="excluded") == ["b.png", "c.png"]
    assert files(client, only="uncaptioned") == []
    assert files(client) == ["a.png", "b.png", "c.png"]
    assert client.get(f"{API}/buckets").json()[0]["pictures"] == 1
    assert exclude(client, "c.png", excluded=False)["excluded"] == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_job_gets_what_was_decided_and_its_own_choices(
    services: Services, client: TestClient
) -> None:
    exclude(client, "b.png")
    box = client.put(f"{API}/crop-boxes/a.png", json={"box": [0, 0, 200, 300]})
    assert box.json()["items"][0]["crop_box"] == [0, 0, 200, 300]
    dataset = job_datasets(services, exclude=["c.png"])
    assert dataset["exclude"] == ["b.png", "c.png"]
    assert dataset["crop_boxes"] == {"a.png": [0, 0, 200, 300]}
    assert services.checks.largest_bucket(
        NANO, [{"id": "p", "instance_data_dir": "datasets/photos"}]
    )


def test_a_crop_box_decides_about_the_bucket(client: TestClient) -> None:
    query = {"resolution": 128, "resolution_type": "pixel", "crop": False}
    body = {"box": [200, 50, 128, 128]}
    item = client.put(f"{API}/crop-boxes/c.png", json=body, params=query).json()["items"][0]
    assert (item["bucket_px"], item["crop_px"]) == ([128, 128], [200, 50, 128, 128])
    assert {"width_px": 128, "height_px": 128, "pictures": 1} in client.get(
        f"{API}/buckets", params=query
    ).json()
    whole = client.put(f"{API}/crop-boxes/c.png", json={"box": [0, 0, 400, 300]}).json()
    assert whole["items"][0]["crop_box"] is None


def test_a_panorama_can_be_used_after_it_was_cropped(
    services: Services, client: TestClient
) -> None:
    wide = services.workspace.datasets_dir / "photos" / "wide.png"
    Image.new("RGB", (900, 200)).save(wide)
    assert files(client, only="refused") == ["wide.png"]
    client.put(f"{API}/crop-boxes/wide.png", json={"box": [100, 0, 300, 200]})
    assert files(client, only="refused") == []


HOSTILE = (
    ("exclusions", {"files": ["d.png"], "excluded": True}, 404, "no such image"),
    ("exclusions", {"files": ["../../x.png"], "excluded": True}, 404, "no such image"),
    ("exclusions", {"files": [], "excluded": True}, 422, "files"),
    ("exclusions", {"files": ["a.png"]}, 422, "excluded"),
    ("crop-boxes/d.png", {"box": [0, 0, 9, 9]}, 404, "no such image"),
    ("crop-boxes/..%2F..%2Fx.png", {"box": [0, 0, 9, 9]}, 404, ""),
    ("crop-boxes/a.png", {"box": [300, 0, 200, 200]}, 422, "not inside the image of 400x300"),
    ("crop-boxes/a.png", {"box": [0, 0, 9, 9]}, 422, "less than 20% of a side"),
    ("crop-boxes/a.png", {"box": [-1, 0, 200, 200]}, 422, "is not a box"),
    ("crop-boxes/a.png", {"box": [0, 0, 1e300, 200]}, 422, ""),
    ("crop-boxes/a.png", {"box": [0, 0, 200]}, 422, ""),
    ("inspection", {"trigger": "a\nb"}, 422, "trigger"),
    ("inspection", {"resolution": 0}, 422, "resolution"),
)


def test_a_hostile_request_is_one_clear_problem(client: TestClient) -> None:
    for route, body, status, words in HOSTILE:
        method = "POST" if route == "inspection" else "PUT"
        answer = client.request(method, f"{API}/{route}", json=body)
        assert answer.status_code == status, (route, body, answer.text)
        assert words in answer.text, (route, body, answer.text)
    assert files(client, only="excluded") == []


def test_choices_follow_a_renamed_folder_and_not_a_new_one(
    services: Services, client: TestClient
) -> None:
    exclude(client, "b.png")
    client.put(f"{API}/name", json={"name": "birds"})
    assert client.get("/api/v1/datasets/birds").json()["excluded"] == 1
    created = client.post("/api/v1/datasets", json={"name": "photos"}).json()
    assert created["excluded"] == 0
    client.delete("/api/v1/datasets/birds")
    assert client.post("/api/v1/datasets", json={"name": "birds"}).json()["excluded"] == 0


def test_a_damaged_file_of_choices_loses_only_what_is_damaged(
    services: Services, client: TestClient
) -> None:
    path = services.workspace.server_dir / "image_choices.json"
    path.parent.mkdir(exist_ok=True)
    row = {"exclude": ["a.png", 3], "crop_boxes": {"b.png": [0, 0], "c.png": [0, 0, 200, 200]}}
    path.write_text(json.dumps({"datasets/photos": row, "other": 7}))
    items = client.get(f"{API}/items").json()["items"]
    assert [(item["excluded"], item["crop_box"]) for item in items] == [
        (True, None),
        (False, None),
        (False, [0, 0, 200, 200]),
    ]
    path.write_text("{")
    assert client.get(API).json()["excluded"] == 0


def test_images_are_sorted_by_the_length_of_their_captions(client: TestClient) -> None:
    assert files(client, sort="shortest") == ["b.png", "c.png", "a.png"]
    assert files(client, sort="longest", limit=2) == ["a.png", "c.png"]
    assert client.get(f"{API}/items", params={"sort": "size"}).status_code == 422


def test_an_inspection_is_a_job_whose_output_is_shown(
    services: Services, client: TestClient, tmp_path: Path
) -> None:
    assert client.get(f"{API}/inspection").json() == {
        "job": None, "made_t": None, "request": None, "result": None,
    }  # fmt: skip
    exclude(client, "b.png")
    job = client.post(f"{API}/inspection", json={"trigger": "--json short"}).json()
    assert (job["kind"], job["devices"], job["name"]) == ("inspect", "cpu", "photos")
    assert client.post(f"{API}/inspection", json={}).status_code == 409
    spec = json.loads((services.jobs.jobs_dir / job["id"] / "job.json").read_text())
    place = (
        services.workspace.server_dir
        / "inspections"
        / run_id(services.workspace.datasets_dir / "photos")
    )
    assert spec["argv"][-4:] == [
        "inspect", f"--dataset={place / 'dataset.json'}", f"--output={place / 'result.json'}",
        "--trigger=--json short",
    ]  # fmt: skip
    from click.testing import CliRunner

    from simpletuner.cli import command_group

    ran = CliRunner().invoke(command_group, spec["argv"][-4:])
    assert ran.exit_code == 0, ran.output
    shown = client.get(f"{API}/inspection").json()
    result = shown["result"]
    assert (result["images"], result["rejected_count"], result["captions"]) == (2, 1, 2)
    assert result["blank"] == ["a.png", "c.png"]
    assert result["trigger"]["missing"] == ["a.png", "c.png"]
    assert {finding["code"] for finding in result["findings"]} >= {
        "excluded_images",
        "blank_images",
    }
    assert shown["request"]["trigger"] == "--json short"
    (place / "result.json").write_text('{"images": 3}')
    assert client.get(f"{API}/inspection").json()["result"] is None


def test_the_sample_images_are_copied_once(services: Services, client: TestClient) -> None:
    created = client.post("/api/v1/samples")
    assert created.status_code == 201, created.text
    assert [(info["name"], info["owned"]) for info in created.json()] == [
        ("zorbo", True),
        ("shapes", True),
    ]
    assert created.json()[0]["captioned"] == created.json()[0]["pictures"] == 16
    folder = services.workspace.datasets_dir / "zorbo"
    (folder / "mine.txt").write_text("my own")
    assert client.post("/api/v1/samples").status_code == 201
    assert (folder / "mine.txt").read_text() == "my own"
    (folder / "00.png").unlink()
    refused = client.post("/api/v1/samples")
    assert (refused.status_code, refused.json()["detail"][0]["message"]) == (
        409, "there is already a dataset named zorbo",
    )  # fmt: skip
    assert sorted(path.name for path in services.workspace.datasets_dir.iterdir()) == [
        "photos", "shapes", "zorbo",
    ]  # fmt: skip
