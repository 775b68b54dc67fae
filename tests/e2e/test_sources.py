"""Runs from every source: they end, resume exactly, and keep keys and their order to themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from simpletuner.data import scan
from simpletuner.events.event_types import StageStarted
from tests.data.conftest import bucket, endpoint, hub
from tests.data.image_server import ImageServer, cut, serve, status
from tests.data.source_servers import Hub, pack, parquet
from tests.e2e.test_resume import interrupted
from tests.e2e.training_project import (
    TrainingProject,
    read_checkpoint_files,
    read_events,
    read_losses,
)

__all__ = ["bucket", "endpoint", "hub"]
CANARIES = (b"id-canary", b"secret-canary", b"hf_canary")
SOURCES = ("csv", "parquet", "aws", "huggingface", "webdataset")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TrainingProject:
    return TrainingProject(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with serve() as running:
        yield running


def images(project: TrainingProject) -> dict[str, bytes]:
    folder = project.root / "pictures"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make_source(
    kind: str, project: TrainingProject, server: ImageServer, hub: Hub, bucket: Any
) -> dict[str, Any]:
    """Write the images of the project to a source; return the fields of its dataset."""
    files = images(project)
    texts = {name[:-4]: files[f"{name[:-4]}.txt"].decode() for name in files if "png" in name}
    rows = [
        {"url": f"{server.url}/{name}.png", "caption": text, "weight": 1.0 + index % 2}
        for index, (name, text) in enumerate(texts.items())
    ]
    server.files |= {f"/{name}": content for name, content in files.items()}
    server.files["/shard-0.tar"] = pack(files)
    if kind == "csv":
        table = "".join(json.dumps(row) + "\n" for row in rows)
        (project.root / "list.jsonl").write_text(table)
        return {"type": "jsonl", "table": "list.jsonl", "weight_column": "weight"}
    if kind == "webdataset":
        address = f"{server.url}/shard-{{0..0}}.tar"
        return {"type": "webdataset", "instance_data_dir": address}
    if kind == "aws":
        return bucket(**{f"photos/{name}": content for name, content in files.items()})
    cells = [
        {"image": {"bytes": files[f"{name}.png"]}, "text": text} for name, text in texts.items()
    ]
    content = parquet(cells, row_group_size=4)
    if kind == "parquet":
        (project.root / "list.parquet").write_bytes(content)
        return {"type": "parquet", "table": "list.parquet"}
    hub.fill({"data/train.parquet": content})
    return {
        "type": "huggingface",
        "dataset_name": "owner/name",
        "caption_strategy": "huggingface",
    }


@pytest.mark.slow
def test_another_machine_trains_from_copies_of_the_caches(
    project: TrainingProject, bucket: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", fields["aws_access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", fields["aws_secret_access_key"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    project.write_datasets()
    address = f"s3://{fields['aws_bucket_name']}/caches"
    runs = [
        project.train(
            output_dir=str(project.root / name),
            cache_dir=str(project.root / name / "cache"),
            cache_remote=address,
        )
        for name in ("encoding", "fetching")
    ]
    stages = [
        {event.stage for event in read_events(run) if isinstance(event, StageStarted)}
        for run in runs
    ]
    assert {"encode text", "encode images"} <= stages[0]
    assert stages[1].isdisjoint({"encode text", "encode images"})
    assert read_losses(runs[0]) == read_losses(runs[1])
    for run in runs:
        shutil.rmtree(run)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind == "csv" else pytest.mark.slow) for kind in SOURCES],
)
def test_a_run_from_a_source_resumes_exactly(
    kind: str,
    project: TrainingProject,
    server: ImageServer,
    hub: Hub,
    bucket: Any,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = make_source(kind, project, server, hub, bucket)
    entry = {"id": "photos", "resolution": 64, **fields}
    (project.root / "multidatabackend.json").write_text(json.dumps([entry]))
    straight = project.train(output_dir=str(project.root / kind))
    # The second start has one reader instead of many, and a server that fails now and then.
    monkeypatch.setattr(scan, "SLOW_READER_THREADS", 1)
    monkeypatch.setattr("simpletuner.data.remote_store.FIRST_WAIT_S", 0.001)
    server.faults = {path: [cut, status(503)] for path in server.files}
    resumed = interrupted(project, 3, f"{kind}-stopped")
    assert read_losses(resumed) == read_losses(straight)
    assert read_checkpoint_files(resumed / "checkpoint-6") == read_checkpoint_files(
        straight / "checkpoint-6"
    )
    printed = capfd.readouterr()
    written = [printed.out.encode(), printed.err.encode(), repr(read_events(straight)).encode()]
    for run in (straight, resumed):
        written += [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert not any(canary in content for canary in CANARIES for content in written)
    shutil.rmtree(straight)
    shutil.rmtree(resumed)
