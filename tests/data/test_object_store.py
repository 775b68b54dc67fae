"""Images in an S3 bucket, from moto's server on loopback: listing, faults, credentials, captions."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from simpletuner.data import object_store
from simpletuner.data.source_check import check_sources
from simpletuner.data.transports import TransferError
from simpletuner.errors import ConfigError, DataError
from tests.data.source_servers import KEYS, OPTIONS, PNG, Scanner

FILES = {
    "photos/a.png": PNG,
    "photos/a.txt": b"an a",
    "photos/inside/b.png": PNG,
    "photos/inside/b.txt": b"a b",
    "photos/.hidden.png": PNG,
    "photos/broken.png": b"<html>",
    "photos/broken.txt": b"x",
    "other/c.png": PNG,
}


def test_a_bucket_is_a_folder(bucket: Any, scanner: Scanner, monkeypatch: Any) -> None:
    monkeypatch.setattr(object_store, "KEYS_PER_PAGE", 2)
    fields = bucket(**FILES)
    check_sources(scanner.read(**fields).train)
    found = scanner.scan(**fields)
    assert [(item.sample.id, item.sample.captions) for item in found.samples] == [
        ("p/a.png", ("an a",)),
        ("p/inside/b.png", ("a b",)),
    ]
    assert [item.path for item in found.rejected] == ["broken.png"]
    assert found.samples[0].sample.file.read_bytes(1 << 20) == PNG
    assert scanner.scan(**fields) == found
    # The same objects by their address, with the same keys.
    address = f"s3://{fields.pop('aws_bucket_name')}/{fields.pop('aws_data_prefix')}"
    by_address = scanner.scan(**{**fields, "type": "local", "instance_data_dir": address})
    assert by_address == found
    changed = bucket(**{"photos/a.png": PNG + b"more"})
    again = scanner.scan(**changed)
    assert again.samples[0].sample.file.read_bytes(1 << 20) == PNG + b"more"


def test_a_listing_that_was_interrupted_is_continued(
    bucket: Any, scanner: Scanner, monkeypatch: Any
) -> None:
    monkeypatch.setattr(object_store, "KEYS_PER_PAGE", 1)
    fields = bucket(**{f"photos/{n}.png": PNG for n in range(4)})
    options = {"caption_strategy": "filename"}
    original = object_store._KeyLister.next_page
    asked: list[str] = []

    def next_page(lister: Any) -> Any:
        asked.append(lister._after)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(lister)

    monkeypatch.setattr(object_store._KeyLister, "next_page", next_page)
    with pytest.raises(KeyboardInterrupt):
        scanner.scan(**fields, **options)
    found = scanner.scan(**fields, **options)
    assert len(found.samples) == 4
    names = ["0", "1", "1", "2", "3"]
    assert asked == ["", *(f"photos/{name}.png" for name in names[: len(asked) - 1])]

    def fail(lister: Any) -> Any:
        raise TransferError("no answer", permanent=False)

    monkeypatch.setattr(object_store._KeyLister, "next_page", fail)
    assert scanner.scan(**fields, **options) == found  # the last complete listing
    assert any("its last listing is used" in str(event) for event in scanner.events)
    assert "canary" not in "".join(map(str, scanner.events))


def test_captions_and_tars_of_a_bucket(bucket: Any, scanner: Scanner) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in (("0.png", PNG), ("0.txt", b"zero")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    lines = b'{"id": "a", "caption": "from the table"}\n'
    fields = bucket(
        **{"photos/a.png": PNG, "photos/t.jsonl": lines, "photos/s.tar": packed.getvalue()}
    )
    found = scanner.scan(**fields, caption_strategy="jsonl", caption_table="t.jsonl")
    assert [item.sample.captions for item in found.samples] == [("from the table",)]
    address = f"s3://{fields['aws_bucket_name']}/photos"
    keys = {name: value for name, value in fields.items() if name.startswith("aws_")}
    shards = scanner.scan(type="webdataset", instance_data_dir=address, **keys)
    assert [item.sample.id for item in shards.samples] == ["p/s.tar/0.png"]
    assert shards.samples[0].sample.file.read_bytes(1 << 20) == PNG


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aws_bucket_name": "none-such"}, "none-such/photos: does not exist"),
        ({"aws_endpoint_url": "http://127.0.0.1:9"}, ""),
    ],
)
def test_a_bucket_is_looked_at_before_the_training(
    bucket: Any, scanner: Scanner, fields: dict[str, str], message: str
) -> None:
    found = scanner.read(**{**bucket(), **fields})
    if not message:
        check_sources(found.train)  # the scan waits for a server that does not answer
        return
    with pytest.raises(DataError, match=message):
        check_sources(found.train)


def test_missing_credentials_are_named(
    bucket: Any, scanner: Scanner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fields = {name: value for name, value in bucket().items() if name not in KEYS}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match="no credentials; set aws_access_key_id"):
        check_sources(scanner.read(**fields).train)


def test_keys_are_shown_nowhere(bucket: Any, scanner: Scanner) -> None:
    found = scanner.read(**bucket(**FILES))
    assert "canary" not in repr(found)
    scanner.scan(**bucket())
    assert "canary" not in "".join(map(str, scanner.events))
    stored = b"".join(
        path.read_bytes() for path in (scanner.folder / "cache").rglob("*") if path.is_file()
    )
    assert b"canary" not in stored


def test_a_missing_driver_is_named(scanner: Scanner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store.importlib.util, "find_spec", lambda name: None)
    for address, extra in (("s3://b", "s3"), ("gs://b", "gcs"), ("az://b", "azure")):
        with pytest.raises(ConfigError, match=rf"pip install 'simpletuner\[{extra}\]'"):
            scanner.read(instance_data_dir=address)


def test_limits_hold_for_objects(bucket: Any, scanner: Scanner) -> None:
    small = OPTIONS.model_copy(update={"max_image_megapixels": 1e-6})
    with pytest.raises(DataError, match="megapixels"):
        scanner.scan(small, **bucket(**FILES))
