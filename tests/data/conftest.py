from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ResizeCropConfig
from tests.data.image_server import ImageServer, serve
from tests.data.source_servers import KEYS, PNG, TOKEN, Hub, Scanner


@pytest.fixture
def options() -> DataOptions:
    return DataOptions(resolution=128, caption_dropout_probability=0.0)


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., DatasetConfig]:
    """A dataset over tmp_path/photos; keywords as in Dataset."""

    def make(name: str = "photos", **fields: object) -> DatasetConfig:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        settings = {
            "dataset_type": "image",
            "instance_data_dir": folder,
            "resize_crop": ResizeCropConfig(resolution=128),
        }
        return DatasetConfig(id=name, **(settings | fields))

    return make


@pytest.fixture
def scanner(tmp_path: Path) -> Scanner:
    return Scanner(tmp_path)


@pytest.fixture
def server() -> Iterator[ImageServer]:
    """A web server with six copies of an image."""
    with serve() as running:
        running.files |= {f"/i/{n}.png": PNG for n in range(6)}
        yield running


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@lru_cache(maxsize=1)
def make_client(endpoint: str) -> Any:
    """Return a client of a server; making one takes longer than most tests of a bucket."""
    import botocore.session

    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="id-canary",
        aws_secret_access_key="secret-canary",
    )


@pytest.fixture
def bucket(endpoint: str, request: pytest.FixtureRequest) -> Any:
    """A function that writes objects into a new bucket, and the fields of a dataset of it."""
    client = make_client(endpoint)
    name = f"b{abs(hash(request.node.nodeid)):x}"[:40]
    client.create_bucket(Bucket=name)

    def fill(**objects: bytes) -> dict[str, Any]:
        for key, content in objects.items():
            client.put_object(Bucket=name, Key=key, Body=content)
        return {
            "type": "aws",
            "aws_bucket_name": name,
            "aws_data_prefix": "photos",
            "aws_endpoint_url": endpoint,
            "aws_region_name": "us-east-1",
            **KEYS,
        }

    return fill


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub

    with serve() as server:
        original = huggingface_hub.HfApi
        monkeypatch.setattr(
            huggingface_hub, "HfApi", lambda: original(endpoint=server.url, token=TOKEN)
        )
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
        yield Hub(server)
