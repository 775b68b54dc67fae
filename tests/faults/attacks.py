"""Hostile archives and requests: whatever is sent, no answer is a 500."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from simpletuner.server.app import create_app
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace
from tests.data.unusable_files import encode_image, noise_image
from tests.faults.images import damage
from tests.faults.outcomes import Lost, Tally, require_answer

HERE = "http://127.0.0.1"
NAMES = (
    "a.png", "../a.png", "/etc/passwd", "a/../../b.png", "C:\\a.png", "a\x00b.png", "\u202ea.png", ".hidden",
    "a" * 300 + ".png", "con.png", "a.zip", "x.txt", "e\u0301.png", "\xe9.png", "a//b.png", "",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 10**30, 1.5, "", "x", "\ud800", "\u202e", "../..", "a" * 5000, [], [1, "x"], {},
    {"a": {"b": [None]}},
)  # fmt: skip


def hostile_archive(generator: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for _ in range(generator.randrange(1, 5)):
            name = generator.choice(NAMES) or "x"
            content = generator.choice(
                (b"", b"x" * 10, bytes(3_000_000), encode_image(noise_image(), "PNG"))
            )
            member = zipfile.ZipInfo(name.replace("\x00", "_"))
            member.external_attr = generator.choice((0, 0o120777 << 16, 0o777 << 16))
            archive.writestr(member, content)
    data = buffer.getvalue()
    return damage(generator, data) if generator.random() < 0.5 else data


def attacks(generator: random.Random, root: Path, count: int) -> Tally:
    tally = Tally("archives and requests")
    outside = root / "outside"
    outside.mkdir(parents=True, exist_ok=True)
    (outside / "secret").write_text("secret")
    work = root / "work"
    work.mkdir(exist_ok=True)
    app = create_app(ServerSettings(Workspace(work)))
    client = TestClient(app, base_url=HERE, raise_server_exceptions=False)
    routes = [
        (path, method)
        for path, methods in app.openapi()["paths"].items()
        for method in methods
        if path.startswith("/api/")
    ]
    for number in range(count):
        if number % 3 == 0:
            name = f"set-{number % 7}"
            data = hostile_archive(generator)

            def attempt(name: str = name, data: bytes = data) -> None:
                headers = {"content-type": "application/octet-stream"}
                answer = client.put(
                    f"/api/v1/datasets/{name}/files/x.zip", content=data, headers=headers
                )
                require_answer(answer.status_code)

            tally.try_one(f"archive {number}", attempt)
        else:
            path, method = generator.choice(routes)
            for part in ("id", "name", "path", "file"):
                path = path.replace(
                    f"{{{part}}}", generator.choice(("x", "0" * 12, "%2e%2e", "a b", "%00", "%F0"))
                )
            fields = (
                "name",
                "config",
                "datasets",
                "text",
                "token",
                "version",
                "kind",
                "id",
                "folder",
                "captions",
            )
            body = {generator.choice(fields): generator.choice(VALUES) for _ in range(3)}
            text = json.dumps(generator.choice((body, body, VALUES[number % len(VALUES)])))

            def ask(path: str = path, method: str = method, text: str = text) -> None:
                headers = {"content-type": "application/json"}
                answer = client.request(method.upper(), path, content=text, headers=headers)
                require_answer(answer.status_code)

            tally.try_one(f"{method} {path} {text:.200}", ask)
        if (outside / "secret").read_text() != "secret" or len(list(root.iterdir())) != 2:
            tally.try_one(f"number {number}", _report_escape)
    return tally


def _report_escape() -> None:
    raise Lost("something outside of the workspace was written")
