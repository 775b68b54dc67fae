"""Twenty-five attacks on generations, captions, the trash, datasets, LoRAs and preferences.

One workspace holds a link out of it, a record of the trash that was changed by hand, and a dataset
with a link in it; next to the workspace is a secret. Every attack is a request. Whatever the server
answers, the secret is not in it, nothing outside changes, and no job is queued.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from simpletuner.server.app import create_app
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace

SECRET = "hf_secret_of_somebody_else"
TAMPERED = "20260101-000000-abcdef"
GENERATION = "0123456789ab"
JSON = {"content-type": "application/json"}
GENERATE = {"prompts": ["a"], "flavour": "nano"}
PARTS = [{"path": "output/fox/lora.safetensors"}]


@dataclass(frozen=True)
class Attack:
    """One request that must fail. statuses: what the server may answer."""

    method: str
    route: str
    body: Any = None
    statuses: tuple[int, ...] = (404, 422)


def generate(**change: Any) -> Attack:
    return Attack("POST", "generations", {**GENERATE, **change})


ATTACKS = {
    "1 a LoRA of the system": generate(lora="/etc/passwd"),
    "2 a LoRA through a link": generate(lora="link/secret.txt"),
    "3 an image above the workspace": generate(image="../outside/secret.txt"),
    "4 a mask through a link": generate(image="datasets/set/a.png", mask="link/secret.txt"),
    "5 a size of terabytes": generate(size="99999x99999"),
    "6 a million steps": generate(steps=10**6),
    "7 strengths that are no numbers": generate(lora="x", strengths=["nan"]),
    "8 a group that is a path": generate(group="../../x"),
    "9 a field that sets the command": generate(argv=["sh", "-c", "touch pwned"]),
    "10 the request of a generation": Attack("GET", f"generations/{GENERATION}/files/request.json"),
    "11 a file above a generation": Attack(
        "GET", f"generations/{GENERATION}/files/..%2f..%2f..%2foutside%2fsecret.txt"
    ),
    "12 a generation that is a path": Attack("DELETE", "generations/..%2f..%2foutside"),
    "13 captions of a folder of the system": Attack(
        "POST", "captioning", {"dataset": "../../etc", "model": "a/b"}
    ),
    "14 a model that is an option": Attack(
        "POST", "captioning", {"dataset": "set", "model": "--trust-remote-code"}
    ),
    "15 captions through a link": Attack(
        "POST",
        "datasets/set/caption-edits",
        {"action": "prefix", "text": "x", "files": ["../../link/secret.png"], "preview": False},
        (200, 404, 422),
    ),
    "16 an entry of the trash that is a path": Attack("POST", "trash/..%2f..%2foutside/restore"),
    "17 a record that was changed by hand": Attack("POST", f"trash/{TAMPERED}/restore"),
    "18 a folder next to the trash": Attack("DELETE", "trash/..%2fdatasets"),
    "19 a dataset that is a path": Attack("DELETE", "datasets/..%2f..%2foutside"),
    "20 a name that leads out": Attack("PUT", "datasets/set/name", {"name": "../../outside/set"}),
    "21 images that lead out": Attack(
        "POST", "datasets/set/deletions", {"files": ["../../../outside/secret.txt"]}
    ),
    "22 a LoRA file that is none": Attack("GET", "loras/file?path=link/secret.txt"),
    "23 deleting what is no LoRA": Attack(
        "DELETE", "loras/file?path=.simpletuner/trash", None, (404, 409, 422)
    ),
    "24 a new file outside": Attack(
        "POST", "loras", {"action": "export", "parts": PARTS, "name": "../../outside/x"}
    ),
    "25 a cache that is a folder": Attack("DELETE", "storage/..%2f..%2foutside"),
}


def test_there_are_twenty_five() -> None:
    assert [int(name.split()[0]) for name in ATTACKS] == list(range(1, 26))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house").resolve()
    outside, workspace = folder / "outside", folder / "workspace"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    dataset = workspace / "datasets" / "set"
    dataset.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(dataset / "a.png")
    (dataset / "a.txt").write_text("a disc")
    (workspace / "link").symlink_to(outside)
    (dataset / "out").symlink_to(outside)
    generation = workspace / "generations" / GENERATION
    generation.mkdir(parents=True)
    record = {"request": GENERATE, "job": "", "created_t": 1.0}
    (generation / "request.json").write_text(json.dumps(record))
    entry = workspace / ".simpletuner" / "trash" / TAMPERED
    entry.mkdir(parents=True)
    (entry / "0").write_text("replaced")
    tampered = {
        "kind": "run",
        "label": "x",
        "deleted_t": 1.0,
        "paths": [str(outside / "secret.txt")],
        "replaces": True,
    }
    (entry / "trash.json").write_text(json.dumps(tampered))
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    app = create_app(ServerSettings(Workspace(folder / "workspace")))
    yield TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    shutil.rmtree(folder, ignore_errors=True)


def contents(folder: Path) -> dict[str, str]:
    """Return the content of every file, by its path, and the target of every link.

    The index of a dataset is left out, which the server writes when it reads the dataset.
    """
    index = folder / "workspace" / ".simpletuner" / "datasets"
    entries = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    entries = [path for path in entries if index not in path.parents]
    return {
        str(path.relative_to(folder)): (
            str(path.readlink())
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in entries
    }


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_changes_nothing(client: TestClient, folder: Path, name: str) -> None:
    attack, before = ATTACKS[name], contents(folder)
    answer = client.request(
        attack.method, f"/api/v1/{attack.route}", json=attack.body, headers=JSON
    )
    assert answer.status_code in attack.statuses, answer.text
    assert SECRET not in answer.text
    assert "Traceback" not in answer.text
    assert contents(folder) == before
    assert client.get("/api/v1/queue").json()["jobs"] == []


@pytest.mark.parametrize("token", ["hf_a\nb", "x" * 10_000, "é"])
def test_a_token_is_one_line_and_never_sent_back(client: TestClient, token: str) -> None:
    answer = client.put("/api/v1/preferences/hub-token", json={"token": token})
    assert answer.status_code == 422
    assert token not in client.get("/api/v1/preferences").text


def test_a_stored_token_is_not_in_any_answer(client: TestClient, folder: Path) -> None:
    assert client.put("/api/v1/preferences/hub-token", json={"token": SECRET}).status_code == 200
    for route in ("preferences", "system", "storage", "trash", "queue", "drafts"):
        assert SECRET not in client.get(f"/api/v1/{route}").text, route
    kept = [path for path in (folder / "workspace").rglob("*") if path.is_file()]
    holding = [path for path in kept if SECRET.encode() in path.read_bytes()]
    assert [path.stat().st_mode & 0o777 for path in holding] == [0o600]
