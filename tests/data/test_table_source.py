"""Tables whose rows are images: by path and by URL, with faults of the server."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from simpletuner.data.pixels import load_pixels
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.scan import scan_datasets
from simpletuner.data.source_check import check_sources
from simpletuner.errors import ConfigError, DataError
from tests.data.image_server import ImageServer, cut, redirect, status, wrong_length
from tests.data.source_servers import OPTIONS, PNG, Scanner, pack, write_table
from tests.data.unusable_files import noise_image


def rows(server: ImageServer, count: int = 6, **more: Any) -> list[dict[str, Any]]:
    return [{"url": f"{server.url}/i/{n}.png", "caption": f"c{n}", **more} for n in range(count)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_rows_of_urls_are_images(scanner: Scanner, server: ImageServer, suffix: str) -> None:
    write_table(scanner.folder / f"t.{suffix}", rows(server))
    found = scanner.scan(type=suffix, table=f"t.{suffix}")
    host = server.url.removeprefix("http://")
    assert [item.sample.id for item in found.samples] == [f"p/{host}/i/{n}.png" for n in range(6)]
    assert [item.sample.captions for item in found.samples] == [(f"c{n}",) for n in range(6)]
    assert found.samples[0].sample.file.read_bytes(1 << 20) == PNG
    assert set(server.requests.values()) == {1}
    again = scanner.scan(type=suffix, table=f"t.{suffix}")
    assert again == found
    assert set(server.requests.values()) == {1}  # a second start needs no network
    assert any("5 images are copies of others" in str(event) for event in scanner.events)


def test_simpletuners_names_of_a_csv(scanner: Scanner, server: ImageServer) -> None:
    write_table(scanner.folder / "list.csv", [{"link": f"{server.url}/i/0.png", "said": "x"}])
    fields = {"csv_url_column": "link", "csv_caption_column": "said", "csv_cache_dir": "c"}
    found = scanner.scan(type="csv", csv_file="list.csv", caption_strategy="csv", **fields)
    assert [item.sample.captions for item in found.samples] == [("x",)]


def test_rows_of_paths_sizes_weights_and_alternatives(scanner: Scanner) -> None:
    (scanner.folder / "photos").mkdir()
    (scanner.folder / "secret.png").write_bytes(PNG)
    for name in ("a.png", "b.png"):
        (scanner.folder / "photos" / name).write_bytes(PNG)
    table = [
        {"path": "a.png", "text": "one", "w": 2},
        {"path": "./a.png", "text": "two", "w": 2},
        {"path": "b.png", "text": "", "w": 0.5},
        {"path": "../secret.png", "text": "x", "w": 1},
        {"path": "file:///etc/passwd", "text": "x", "w": 1},
        {"path": "b.png", "text": "x", "w": "many"},
        {"path": None, "text": "x", "w": 1},
        {"path": "none.png", "text": "x", "w": 1},
        {"path": "a.png", "text": "left out", "w": 0},
    ]
    write_table(scanner.folder / "t.jsonl", table)
    options = OPTIONS.model_copy(update={"missing_caption": "empty"})
    found = scanner.scan(
        options, type="jsonl", table="t.jsonl", instance_data_dir="photos", weight_column="w"
    )
    samples = [item.sample for item in found.samples]
    assert [(item.id, item.captions, item.weight) for item in samples] == [
        ("p/a.png", ("one", "two"), 2.0),
        ("p/b.png", ("",), 0.5),
    ]
    assert {item.path: item.reason for item in found.rejected} == {
        "4": "table_row",
        "5": "table_row",
        "6": "table_row",
        "7": "table_row",
        "none.png": "unreadable",
    }
    assert "p: 1 row left out by weight 0" in scanner.notices()


def test_sizes_in_the_table_need_no_request(scanner: Scanner, server: ImageServer) -> None:
    width, height = noise_image().size
    write_table(scanner.folder / "t.jsonl", rows(server, w=width, h=height))
    found = scanner.scan(type="jsonl", table="t.jsonl", width_column="w", height_column="h")
    assert len(found.samples) == 6
    assert not server.requests
    assert found.samples[0].sample.file.read_bytes(1 << 20) == PNG


def test_failures_that_pass_are_repeated_and_told(scanner: Scanner, server: ImageServer) -> None:
    server.faults = {
        "/i/1.png": [cut, cut],
        "/i/2.png": [status(429, Retry_After="7")],
        "/i/3.png": [status(503)],
    }
    write_table(scanner.folder / "t.csv", rows(server))
    found = scanner.scan(type="csv", table="t.csv")
    assert len(found.samples) == 6
    assert sorted(scanner.waits) == [1.0, 1.0, 2.0, 7.0]
    told = [note for note in scanner.notices() if "attempt" in note]
    assert len(told) == 4
    assert any("the connection was cut after" in note for note in told)
    assert any("HTTP 429" in note and "in 7 s" in note for note in told)
    assert server.headers_of["/i/1.png"][1]["Range"] == f"bytes={len(PNG) // 2}-"


def test_what_stays_broken_is_rejected_for_good(scanner: Scanner, server: ImageServer) -> None:
    server.files["/i/4.png"] = b"<html>gone</html>"
    server.faults = {
        "/i/0.png": [status(500)] * 5,
        "/i/1.png": [wrong_length],
        "/i/2.png": [redirect("file:///etc/passwd")],
        "/i/3.png": [redirect("/i/5.png")],
    }
    table = [*rows(server), {"url": f"{server.url}/none.png", "caption": "x"}]
    write_table(scanner.folder / "t.csv", table)
    found = scanner.scan(type="csv", table="t.csv")
    names = [item.sample.file.name for item in found.samples]
    assert names == ["1.png", "3.png", "5.png"]
    with pytest.raises(UnusableFile, match="cannot be decoded"):  # a third of it has arrived
        load_pixels(found.samples[0], OPTIONS)
    reasons = {item.path.rpartition("/")[2]: item.detail for item in found.rejected}
    assert "HTTP 500" in reasons["0.png"]
    assert "HTTP 302 Found, which is not followed" in reasons["2.png"]
    assert "starts with '<html>" in reasons["4.png"]
    assert "HTTP 404" in reasons["none.png"]
    before = dict(server.requests)
    again = scanner.scan(type="csv", table="t.csv")  # the server works now
    assert again == found
    for name in ("/i/0.png", "/i/2.png", "/none.png"):
        assert server.requests[name] == before[name]


def test_failures_of_a_start_that_stopped_are_forgotten(
    scanner: Scanner, server: ImageServer
) -> None:
    server.faults = {f"/i/{n}.png": [status(502)] * 5 for n in range(6)}
    write_table(scanner.folder / "t.csv", rows(server))
    strict = OPTIONS.model_copy(update={"max_bad_sample_fraction": 0.1})
    with pytest.raises(DataError, match="6 of 6 images cannot be used"):
        scanner.scan(strict, type="csv", table="t.csv")
    assert len(scanner.scan(strict, type="csv", table="t.csv").samples) == 6


def test_copies_are_bounded_and_come_back(scanner: Scanner, server: ImageServer) -> None:
    write_table(scanner.folder / "t.csv", rows(server))
    scanner.max_bytes = 2 * len(PNG)
    found = scanner.scan(type="csv", table="t.csv")
    copies = list((scanner.folder / "cache/files").rglob("*"))
    assert sum(path.stat().st_size for path in copies if path.is_file()) <= 2 * len(PNG)
    with RemoteStore(scanner.folder / "cache", scanner.events.append) as store:
        again = scan_datasets(
            scanner.read(type="csv", table="t.csv").train,
            OPTIONS,
            0,
            scanner.events.append,
            alignment_px=64,
            store=store,
        )
        assert again == found
        for item in again.samples:
            assert item.sample.file.read_bytes(1 << 20) == PNG


def test_a_file_above_the_limit_is_refused_while_it_arrives(
    scanner: Scanner, server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simpletuner.data import remote_file

    monkeypatch.setattr(
        remote_file.RemoteFile.__init__, "__defaults__", ((-1, 0, 0), len(PNG) - 1, False)
    )
    write_table(scanner.folder / "t.csv", rows(server, 1))
    with pytest.raises(DataError, match="is larger than"):
        scanner.scan(type="csv", table="t.csv")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "csv"}, "p.table is missing"),
        ({"type": "csv", "table": "none.csv"}, '"none.csv" is not a file'),
        (
            {"type": "csv", "table": "ftp://x/y.csv"},
            "p.table cannot be read from ftp://; allowed: http://",
        ),
        ({"type": "local", "instance_data_dir": "https://x/photos"}, "cannot be listed"),
        ({"type": "local", "instance_data_dir": "gopher://x/y"}, "cannot be read from gopher://"),
        ({"type": "local", "instance_data_dir": "d", "caption_strategy": "huggingface"}, "needs"),
    ],
)
def test_a_wrong_source_is_named(scanner: Scanner, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        scanner.read(**fields)
    assert message in str(raised.value)


def test_a_missing_column_is_named_before_the_training(scanner: Scanner) -> None:
    write_table(scanner.folder / "t.csv", [{"a": "1", "b": "2"}])
    found = scanner.read(type="csv", table="t.csv")
    with pytest.raises(DataError, match="has no column of images; it has a, b"):
        check_sources(found.train)
    found = scanner.read(type="csv", table="t.csv", image_column="a", caption_column="c")
    with pytest.raises(DataError, match="has no column c; it has a, b"):
        check_sources(found.train)


@pytest.mark.parametrize("sends_parts", [True, False])
def test_tar_files_behind_urls(scanner: Scanner, server: ImageServer, sends_parts: bool) -> None:
    server.sends_parts = sends_parts
    for number in range(2):
        images = {"0.png": PNG, "0.txt": f"shard {number}".encode()}
        server.files[f"/t/{number:02d}.tar"] = pack(images)
    fields = {"type": "webdataset", "instance_data_dir": f"{server.url}/t/{{00..01}}.tar"}
    found = scanner.scan(**fields)
    assert [item.sample.captions for item in found.samples] == [("shard 0",), ("shard 1",)]
    before = server.requests.total()
    assert scanner.scan(**fields) == found
    assert server.requests.total() == before  # the members are remembered, the files copied
    if sends_parts:
        scanner.max_bytes = 4  # now each tar is too large for a copy
        shutil.rmtree(scanner.folder / "cache/files")
        with RemoteStore(scanner.folder / "cache", scanner.events.append, 4) as store:
            again = scan_datasets(
                scanner.read(**fields).train,
                OPTIONS,
                0,
                scanner.events.append,
                alignment_px=64,
                store=store,
            )
            assert again == found
            assert again.samples[1].sample.file.read_bytes(1 << 20) == PNG
        assert "Range" in server.headers_of["/t/01.tar"][-1]
        assert not list((scanner.folder / "cache").rglob("*.tar"))


def test_ranges_of_tar_files_are_checked(scanner: Scanner) -> None:
    for wrong in ("{5..1}", "{0..999999}"):
        with pytest.raises(DataError, match="must be a range of up to"):
            scanner.scan(type="webdataset", instance_data_dir=f"http://127.0.0.1:9/{wrong}.tar")
