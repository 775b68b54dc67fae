"""Requests that Schemathesis makes from the OpenAPI document: no answer is a 500.

Half of the requests follow the schemas of the document, half break them. Names in paths are mostly
those of things that exist, so that routes get beyond "not found".
"""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode

from simpletuner.server.app import create_app
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace
from tests.data.unusable_files import encode_image, noise_image
from tests.faults.outcomes import Tally, require_answer
from tests.server.run_folder_writer import RunFolderWriter

HERE = "http://127.0.0.1"
EXISTING_SHARE = 0.7  # of the names in paths


def openapi_requests(generator: random.Random, root: Path, count: int) -> Tally:
    """Send up to count requests, equally many to each route in both ways to make them.

    Each route has a workspace of its own, because other routes delete what it would find. Of a
    small count only some routes get any.
    """
    tally = Tally("requests from the schemas")
    schema = schemathesis.openapi.from_dict(make_app(root / "document").openapi())
    operations = [result.ok() for result in schema.get_all_operations()]
    chosen = generator.sample(operations, min(len(operations), max(1, count // 4)))
    for number, operation in enumerate(chosen):
        app = make_app(root / str(number))
        modes = [GenerationMode.POSITIVE]
        if operation.query or operation.body:
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:
            requests = settings(
                max_examples=count // len(chosen) // 2,
                phases=[Phase.generate],
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            made = given(operation.as_strategy(generation_mode=mode), strategies.randoms())
            send = seed(generator.randrange(2**32))(requests(made(_sender(tally, app))))
            # Nothing breaks the schema of a body that may be anything.
            with suppress(Unsatisfiable if mode is GenerationMode.NEGATIVE else ()):
                send()
    return tally


def make_app(root: Path) -> FastAPI:
    """Return the real application over a workspace with a run, a dataset, a draft and a deletion."""
    workspace = root / "workspace"
    run = workspace / "output" / "first"
    RunFolderWriter(run).write_start().write_steps(1, 3)
    (run / "train.log").write_text("a line\n")
    for name in ("photos", "old"):
        folder = workspace / "datasets" / name
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(encode_image(noise_image(), "PNG"))
        (folder / "a.txt").write_text("a caption")
    app = create_app(ServerSettings(Workspace(workspace)))
    client = TestClient(app, base_url=HERE)
    draft = {"name": "first", "config": {}, "datasets": []}
    client.post("/api/v1/drafts", json=draft).raise_for_status()
    client.delete("/api/v1/datasets/old").raise_for_status()
    return app


def _sender(tally: Tally, app: FastAPI) -> object:
    """Return the function that Hypothesis calls with each request and a generator of numbers."""
    client = TestClient(app, base_url=HERE, raise_server_exceptions=False)
    existing = {
        "id": [
            entry["id"]
            for entries in (
                client.get("/api/v1/runs").json()["runs"],
                client.get("/api/v1/drafts").json(),
                client.get("/api/v1/trash").json(),
            )
            for entry in entries
        ],
        "name": ["photos", "checkpoint-2"],
        "path": ["a.png", "config.json", "events.jsonl"],
    }

    def send(case: Case, choices: random.Random) -> None:
        for parameter in case.path_parameters:
            if choices.random() < EXISTING_SHARE:
                case.path_parameters[parameter] = choices.choice(existing[parameter])
        request = case.as_transport_kwargs(base_url=HERE)
        tally.try_one(
            f"{request['method']} {request['url']} {case.body!r:.300}",
            lambda: require_answer(client.request(**request).status_code),
        )

    return send
