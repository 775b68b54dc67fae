"""An application of the dataset routes alone, in a workspace of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from simpletuner.server.api import datasets as routes
from simpletuner.server.datasets import Datasets
from simpletuner.server.place import Place
from simpletuner.server.refusal import answer_refusals
from simpletuner.server.settings import Settings
from tests.data.bad_files import encoded

PNG = encoded(Image.new("RGB", (96, 64), (200, 30, 30)), "PNG")
OTHER_PNG = encoded(Image.new("RGB", (64, 96), (30, 30, 200)), "PNG")


def place(folder: Path, *roots: Path) -> Place:
    folder.mkdir(exist_ok=True)
    return Place(folder.resolve(), tuple(root.resolve() for root in roots))


def client(where: Place, max_upload_bytes: int = 1 << 30) -> TestClient:
    app = FastAPI()
    settings = Settings(where, max_upload_bytes=max_upload_bytes)
    app.state.home = SimpleNamespace(place=where, settings=settings, datasets=Datasets(where))
    app.include_router(routes.router)
    answer_refusals(app)
    return TestClient(app, raise_server_exceptions=False)
