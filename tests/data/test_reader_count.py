"""The samples of each source, and their order, do not depend on how many threads read it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.data import scan
from simpletuner.data.sample_order import SampleOrder
from tests.data.image_server import ImageServer, cut, status
from tests.data.source_servers import OPTIONS, REPOSITORY, Hub, Scanner, pack, parquet, write_table

COUNT = 10
SOURCES = ("local", "webdataset", "csv", "parquet", "aws", "huggingface", "https")


def make_files() -> dict[str, bytes]:
    """Images of several shapes with captions, so that they are in several buckets."""
    files = {}
    for number in range(COUNT):
        content = io.BytesIO()
        Image.new("RGB", (128 + 64 * (number % 3), 128), (number, 0, 0)).save(content, "PNG")
        files |= {f"{number}.png": content.getvalue(), f"{number}.txt": f"text {number}".encode()}
    return files


def make_source(
    kind: str, folder: Path, server: ImageServer, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """Write the images to a source; return its fields. Only the servers that it needs are started."""
    files = make_files()
    server.files |= {f"/i/{name}": content for name, content in files.items()}
    cells = [
        {"image": {"bytes": files[f"{n}.png"]}, "text": files[f"{n}.txt"].decode()}
        for n in range(COUNT)
    ]
    if kind == "local":
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return {"instance_data_dir": str(folder)}
    if kind == "webdataset":
        (folder / "a.tar").write_bytes(pack(files))
        return {"type": kind, "instance_data_dir": str(folder)}
    if kind == "https":
        server.files["/shard-0.tar"] = pack(files)
        return {"type": "webdataset", "instance_data_dir": f"{server.url}/shard-{{0..0}}.tar"}
    if kind == "csv":
        rows = [{"url": f"{server.url}/i/{n}.png", "caption": f"text {n}"} for n in range(COUNT)]
        return {"type": kind, "table": str(write_table(folder / "list.csv", rows))}
    if kind == "aws":
        bucket: Any = request.getfixturevalue("bucket")
        return bucket(**{f"photos/{name}": content for name, content in files.items()})
    if kind == "parquet":
        (folder / "list.parquet").write_bytes(parquet(cells, row_group_size=3))
        return {"type": kind, "table": str(folder / "list.parquet")}
    hub: Hub = request.getfixturevalue("hub")
    hub.fill({"data/train.parquet": parquet(cells, row_group_size=3)})
    return {"type": kind, "dataset_name": REPOSITORY, "caption_strategy": "huggingface"}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_order_is_that_of_one_reader(
    kind: str,
    tmp_path: Path,
    server: ImageServer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "images").mkdir()
    fields = make_source(kind, tmp_path / "images", server, request)
    orders, samples = [], []
    for readers in (1, 7):
        monkeypatch.setattr(scan, "READER_THREADS", readers)
        monkeypatch.setattr(scan, "SLOW_READER_THREADS", readers)
        monkeypatch.setattr(scan, "FILES_PER_CHUNK", 1)
        monkeypatch.setattr(scan, "SLOW_FILES_PER_CHUNK", 1)
        # The first images arrive last: their requests fail and are repeated.
        server.faults = {f"/i/{n}.png": [status(503), cut] for n in range(3)} if readers > 1 else {}
        folder = tmp_path / f"readers-{readers}"
        folder.mkdir()
        scanner = Scanner(folder)
        placed = scanner.scan(**fields).samples
        order = SampleOrder(placed, scanner.read(**fields).train, 1, 2, OPTIONS)
        samples.append([(item.sample.id, item.sample.captions, item.bucket_px) for item in placed])
        orders.append([order.micro_batch(n).visits for n in range(2 * order.batches_per_epoch)])
    assert len(samples[0]) == COUNT
    assert samples[0] == samples[1]
    assert orders[0] == orders[1]
