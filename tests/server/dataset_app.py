"""An application of the dataset routes alone, in a workspace of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from simpletuner.server.api import datasets as routes
from simpletuner.server.api_errors import register_error_handlers
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace
from tests.data.unusable_files import encode_image

PNG = encode_image(Image.new("RGB", (96, 64), (200, 30, 30)), "PNG")
OTHER_PNG = encode_image(Image.new("RGB", (64, 96), (30, 30, 200)), "PNG")


def make_workspace(folder: Path, *roots: Path) -> Workspace:
    folder.mkdir(exist_ok=True)
    return Workspace(folder.resolve(), tuple(root.resolve() for root in roots))


def make_client(where: Workspace, max_upload_bytes: int = 1 << 30) -> TestClient:
    app = FastAPI()
    settings = ServerSettings(where, max_upload_bytes=max_upload_bytes)
    app.state.services = SimpleNamespace(
        workspace=where, settings=settings, datasets=DatasetService(where)
    )
    app.include_router(routes.router)
    register_error_handlers(app)
    return TestClient(app, raise_server_exceptions=False)
