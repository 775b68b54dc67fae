"""Every dataset file in docs/sources.md is read and scanned, with its servers on loopback."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config import jsonc
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.scan import scan_datasets
from simpletuner.data.source_check import check_sources
from tests.data.image_server import ImageServer
from tests.data.source_servers import (
    KEYS,
    OPTIONS,
    PNG,
    Hub,
    image_rows,
    pack,
    parquet,
    write_table,
)

GUIDE = Path(__file__).parents[2] / "docs/sources.md"
BLOCKS = re.findall(r"```jsonc\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
CAPTIONS = {
    "photos": [("zero",), ("one",)],
    "domokun": [("a title", "a, b")],
    "list": [("c0",), ("c1",)],
    "files": [("a file",)],
    "shards": [("of 000",), ("of 001",)],
}


def fill(folder: Path, server: ImageServer, hub: Hub, bucket: Any) -> dict[str, str]:
    """Write what the examples name; return the addresses on loopback by those of the guide."""
    lines = ['{"file_name": "0.png", "text": "zero"}', '{"file_name": "1.png", "text": "one"}']
    fields = bucket(
        **{
            "photos/0.png": PNG,
            "photos/0.txt": b"zero",
            "photos/1.png": PNG,
            "photos/1.txt": b"one",
            "photos/captions.jsonl": "\n".join(lines).encode(),
        }
    )
    (row,) = image_rows(1, 1)
    row |= {"title": "a title", "tags": "a, b", "description": "never read"}
    row["quality_assessment"] = {"clear": 0.9}
    hub.fill({"data/train-00000-of-00001.parquet": parquet([row])})
    rows = [{"url": f"{server.url}/i/{n}.png", "caption": f"c{n}"} for n in range(2)]
    write_table(folder / "list.csv", rows)
    write_table(folder / "files.parquet", [{"path": "a.png", "text": "a file", "weight": 2.0}])
    (folder / "pictures").mkdir()
    (folder / "pictures/a.png").write_bytes(PNG)
    for name in ("000", "001"):
        server.files[f"/shards/{name}.tar"] = pack({"0.png": PNG, "0.txt": f"of {name}".encode()})
    return {
        "my-bucket": fields["aws_bucket_name"],
        "https://s3.example.com": fields["aws_endpoint_url"],
        "eu-central-1": "us-east-1",
        "https://example.com/shards": f"{server.url}/shards",
    }


def test_the_guide_has_an_example_of_each_source() -> None:
    found = {entry["id"] for block in BLOCKS for entry in jsonc.parse_jsonc(block, "x").value}
    assert found == CAPTIONS.keys()


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_an_example_of_the_guide_works(
    number: int, tmp_path: Path, server: ImageServer, hub: Hub, bucket: Any
) -> None:
    block = BLOCKS[number]
    for address, real in fill(tmp_path, server, hub, bucket).items():
        block = block.replace(address, real)
    file = tmp_path / "multidatabackend.json"
    file.write_text(block, encoding="utf-8")
    environ = {
        "PHOTOS_KEY": KEYS["aws_access_key_id"],
        "PHOTOS_SECRET": KEYS["aws_secret_access_key"],
    }
    found = read_dataset_file(file, OPTIONS, environ)
    assert found.notices == ()
    check_sources(found.train)
    strict = OPTIONS.model_copy(update={"max_bad_sample_fraction": 0})
    with RemoteStore(tmp_path / "cache", lambda event: None) as store:
        placed = scan_datasets(
            found.train, strict, 0, lambda event: None, alignment_px=64, store=store
        ).samples
        for item in placed:
            assert item.sample.file.read_bytes(1 << 20).startswith(PNG)
    for dataset in found.train:
        captions = [item.sample.captions for item in placed if item.sample.dataset == dataset.id]
        assert captions == CAPTIONS[dataset.id]
