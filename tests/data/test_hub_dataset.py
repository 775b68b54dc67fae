"""Hub datasets from a small hub on loopback: parquet, tables with images, tar files, filters."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from simpletuner.data import hub_dataset
from simpletuner.data.pixels import load_pixels
from simpletuner.data.source_check import check_sources
from simpletuner.errors import DataError
from tests.data.image_server import Handler, status
from tests.data.source_servers import (
    OPTIONS,
    PNG,
    REPOSITORY,
    TOKEN,
    Hub,
    Scanner,
    image_rows,
    parquet,
)

FIELDS = {"type": "huggingface", "dataset_name": REPOSITORY, "caption_strategy": "huggingface"}


def test_images_in_parquet_files(hub: Hub, scanner: Scanner) -> None:
    files = {
        "data/train-00000-of-00002.parquet": parquet(image_rows(0, 3), row_group_size=2),
        "data/train-00001-of-00002.parquet": parquet(image_rows(3, 2)),
        "data/test-00000-of-00001.parquet": parquet(image_rows(7, 2)),
        "README.md": b"",
    }
    hub.fill(files)
    check_sources(scanner.read(**FIELDS).train)
    found = scanner.scan(**FIELDS)
    assert [item.sample.captions[0] for item in found.samples] == [f"caption {n}" for n in range(5)]
    assert [item.sample.id for item in found.samples][:4] == [
        "p/data/train-00000-of-00002.parquet/1",
        "p/data/train-00000-of-00002.parquet/2",
        "p/data/train-00000-of-00002.parquet/3",
        "p/data/train-00001-of-00002.parquet/1",
    ]
    for number, item in enumerate(found.samples):
        assert item.sample.file.read_bytes(1 << 20) == PNG + bytes([number])
        load_pixels(item, OPTIONS)
    before = dict(hub.server.requests)
    assert scanner.scan(**FIELDS) == found
    downloads = {path for path in hub.server.requests if "resolve" in path}
    assert {hub.server.requests[path] - before[path] for path in downloads} == {0}
    tested = scanner.scan(**FIELDS, split="test")
    assert [item.sample.captions[0] for item in tested.samples] == ["caption 7", "caption 8"]
    sent = hub.server.headers_of[hub.path("data/train-00000-of-00002.parquet")]
    assert all(headers["Authorization"] == f"Bearer {TOKEN}" for headers in sent)
    assert "canary" not in "".join(map(str, scanner.events))


def test_streaming_copies_no_file(hub: Hub, scanner: Scanner) -> None:
    hub.fill({"train.parquet": parquet(image_rows(0, 4))})
    found = scanner.scan(**FIELDS, streaming=True)
    assert found.samples[3].sample.file.read_bytes(1 << 20) == PNG + bytes([3])
    assert not list((scanner.folder / "cache/files").rglob("*"))
    sent = hub.server.headers_of[hub.path("train.parquet")]
    assert all("Range" in headers for headers in sent)


def test_filters_columns_and_an_empty_row(hub: Hub, scanner: Scanner) -> None:
    rows = [*image_rows(0, 6), {**image_rows(9, 1)[0], "image": None}]
    hub.fill({"train.parquet": parquet(rows)})
    filters = {"collection": "photo", "quality_thresholds": {"clear": 0.2}, "min_width": 104}
    block = {"caption_column": ["title", "text"], "filter_func": filters}
    with pytest.raises(DataError, match="has no column title; it has image, text"):
        check_sources(scanner.read(**FIELDS, huggingface=block).train)
    block["caption_column"] = "text"
    found = scanner.scan(**FIELDS, huggingface=block)
    assert [item.sample.captions for item in found.samples] == [("caption 5",)]
    (rejected,) = found.rejected
    assert "the row has no image" in rejected.detail
    assert "p: 3 rows left out by collection" in scanner.notices()
    assert "p: 1 row left out by quality_thresholds.clear" in scanner.notices()
    assert "p: 1 row left out by min_width" in scanner.notices()


def test_a_folder_of_images_with_metadata(hub: Hub, scanner: Scanner) -> None:
    lines = [
        {"file_name": "a.png", "text": "an a"},
        {"file_name": "deep/b.png", "text": "a b"},
        {"file_name": "../other/c.png", "text": "gone"},
    ]
    files = {
        "train/metadata.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
        "train/a.png": PNG,
        "train/deep/b.png": PNG + b"b",
        "validation/a.png": PNG,
    }
    hub.fill(files)
    found = scanner.scan(**FIELDS)
    assert {item.sample.id: item.sample.captions for item in found.samples} == {
        "p/train/a.png": ("an a",),
        "p/train/deep/b.png": ("a b",),
    }
    assert "the repository has no file other/c.png" in found.rejected[0].detail


def test_images_with_text_files_and_prompts(hub: Hub, scanner: Scanner) -> None:
    hub.fill({"1.png": PNG, "1.txt": b"one", "2.png": PNG + b"2", "2.txt": b"two"})
    assert [item.sample.captions for item in scanner.scan(**FIELDS).samples] == [("one",), ("two",)]
    prompt = {**FIELDS, "caption_strategy": "instanceprompt", "instance_prompt": "a cube"}
    assert {item.sample.captions for item in scanner.scan(**prompt).samples} == {("a cube",)}


def test_tar_files_of_the_hub(hub: Hub, scanner: Scanner) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in (("0.png", PNG), ("0.txt", b"zero")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    hub.fill({"shard-000.tar": packed.getvalue()})
    for fields in (FIELDS, {"type": "webshart", "source": REPOSITORY}):
        found = scanner.scan(**fields)
        assert [item.sample.captions for item in found.samples] == [("zero",)]


def test_only_a_folder_of_the_dataset_is_read(hub: Hub, scanner: Scanner) -> None:
    rows = {f"data/{name}/train.parquet": parquet(image_rows(i, 1)) for i, name in enumerate("ab")}
    hub.fill(rows)
    assert len(scanner.scan(**FIELDS).samples) == 2
    (sample,) = scanner.scan(**FIELDS, subfolder="/data/b/").samples
    assert sample.sample.captions == ("caption 1",)
    with pytest.raises(DataError, match="of split train in data/c"):
        scanner.scan(**FIELDS, subfolder="data/c")


def test_the_card_names_the_files(hub: Hub, scanner: Scanner) -> None:
    hub.card = {
        "configs": [
            {"config_name": "small", "data_files": [{"split": "train", "path": "some/*.parquet"}]},
            {"config_name": "default", "data_files": "all/**/*.parquet"},
        ]
    }
    hub.fill(
        {"some/x.parquet": parquet(image_rows(0, 1)), "all/y/z.parquet": parquet(image_rows(1, 1))}
    )
    (small,) = scanner.scan(**FIELDS, dataset_subset="small").samples
    assert small.sample.captions == ("caption 0",)
    (default,) = scanner.scan(**FIELDS).samples
    assert default.sample.captions == ("caption 1",)


def test_the_hubs_own_conversion_is_the_last_resort(hub: Hub, scanner: Scanner) -> None:
    hub.fill({"images.zip": b"PK"})
    hub.fill(
        {"default/train/0000.parquet": parquet(image_rows(0, 2))},
        "refs/convert/parquet",
        "d" * 40,
    )
    assert len(scanner.scan(**FIELDS).samples) == 2
    with pytest.raises(DataError, match="has no parquet files, tables, tar files or images"):
        scanner.scan(**FIELDS, revision="main")


def test_what_the_hub_refuses_is_named(hub: Hub, scanner: Scanner) -> None:
    def missing(handler: Handler, content: bytes) -> None:
        handler.send(404, b"{}", X_Error_Code="RepoNotFound")

    def gated(handler: Handler, content: bytes) -> None:
        handler.send(403, b"{}", X_Error_Code="GatedRepo")

    hub.fill({})
    info = f"/api/datasets/{REPOSITORY}/revision/main"
    for fault, message in ((missing, "there is no such dataset"), (gated, "accept its terms")):
        hub.server.faults[info] = [fault]
        with pytest.raises(DataError, match=message):
            check_sources(scanner.read(**FIELDS).train)


def test_a_hub_that_does_not_answer_leaves_the_last_listing(hub: Hub, scanner: Scanner) -> None:
    hub.fill({"train.parquet": parquet(image_rows(0, 2))})
    found = scanner.scan(**FIELDS)
    info = f"/api/datasets/{REPOSITORY}/revision/main"
    hub.server.faults[info] = [status(504)] * 30
    assert scanner.scan(**FIELDS) == found
    assert any("its last listing is used" in str(event) for event in scanner.events)


def test_offline_the_last_listing_is_used_at_once(
    hub: Hub, scanner: Scanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*values: Any, **named: Any) -> None:
        raise OfflineModeIsEnabled("Cannot reach the hub")

    hub.fill({"train.parquet": parquet(image_rows(0, 2))})
    found = scanner.scan(**FIELDS)
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    assert scanner.scan(**FIELDS) == found
    assert any(
        "(HF_HUB_OFFLINE is set); its last listing" in str(event) for event in scanner.events
    )
    assert scanner.waits == [], "nothing was tried again"
    with pytest.raises(DataError, match="cannot be listed: HF_HUB_OFFLINE is set"):
        scanner.scan(**{**FIELDS, "dataset_name": "owner/other"})


def test_splits_are_found_in_names() -> None:
    location = hub_dataset.HubLocation("a/b")
    files = [hub_dataset.ListedFile(name, 1, 1) for name in ("training.csv", "x/test.csv", "y.csv")]
    chosen = hub_dataset._files_by_name(files, location)
    assert [file.path for file in chosen] == ["training.csv", "y.csv"]
