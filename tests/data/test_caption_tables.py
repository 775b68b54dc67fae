"""Captions of a folder from a table: the same captions from each format, and what cannot be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data import caption_tables
from simpletuner.data.caption_tables import read_caption_table
from simpletuner.data.dataset_config import CaptionTable
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.data.scan import scan_datasets
from simpletuner.errors import ConfigError, DataError, MissingExtra
from tests.data.unusable_files import encode_image, noise_image

PNG = encode_image(noise_image(), "PNG")
IMAGES = ["a.png", "inside/b.png", "c.png"]
ROWS = [
    {"filename": "a.png", "caption": "a red cube", "tags": "x"},
    {"filename": "b", "caption": "", "tags": "a ball"},
    {"filename": "a.png", "caption": "a cube", "tags": "x"},
    {"filename": "of another folder.png", "caption": "never read", "tags": ""},
]
EXPECTED = {"a.png": ("a red cube", "a cube"), "inside/b.png": ("a ball",)}


def write_table(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path: Path, **fields: Any) -> dict[str, tuple[str, ...]]:
    return read_caption_table(CaptionTable(path, path.suffix[1:], **fields), IMAGES)[0]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_each_format_gives_the_same_captions(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"t.{suffix}")
    assert read(path, fallback_column="tags") == EXPECTED
    assert read(path) == {"a.png": EXPECTED["a.png"]}
    assert read(path, caption_columns=("tags", "caption"))["a.png"] == ("x", "a red cube", "a cube")
    with pytest.raises(DataError, match="has no column id, text; it has filename, caption, tags"):
        read(path, filename_column="id", caption_columns=("text",))


def test_lists_are_alternatives_and_spellings_match(tmp_path: Path) -> None:
    rows = [
        {"id": "./inside/b.png", "text": ["one", " two ", "", None, "one"]},
        {"id": "c", "text": 3},
    ]
    path = write_table(tmp_path / "t.jsonl", rows)
    assert read(path) == {"inside/b.png": ("one", "two")}
    table = CaptionTable(
        write_table(tmp_path / "u.jsonl", [{"id": "e\u0301.png", "text": "e"}]), "jsonl"
    )
    assert read_caption_table(table, ["\u00e9.png"])[0] == {"\u00e9.png": ("e",)}


@pytest.mark.parametrize(
    ("name", "text", "first"),
    [
        ("t.jsonl", '{"id": "a", "text": "x"}\n{"id": \n[1]\n', 2),
        ("t.csv", "id,text\na,x\nb\nc,y,z\n", 2),
    ],
)
def test_rows_that_cannot_be_read_are_counted(
    tmp_path: Path, name: str, text: str, first: int
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    captions, notice = read_caption_table(CaptionTable(path, name[2:]), IMAGES)
    assert captions == {"a.png": ("x",)}
    assert notice == f"{name}: 2 rows cannot be read, the first is {first}"


def test_tables_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"id,text\na,\xff\n")
    with pytest.raises(DataError, match=r"t\.csv cannot be read as csv"):
        read(path)
    with pytest.raises(DataError, match=r"none\.csv cannot be read as csv"):
        read(tmp_path / "none.csv")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'simpletuner\[parquet\]'"):
        read(tmp_path / "t.parquet")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"t\.parquet cannot be read as parquet"):
        read(tmp_path / "t.parquet")


def test_only_rows_of_the_folder_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = caption_tables.row_captions

    def counted(row: Any, columns: Any, fallback: Any) -> list[str]:
        seen.append(row["filename"])
        return original(row, columns, fallback)

    monkeypatch.setattr(caption_tables, "row_captions", counted)
    read(write_table(tmp_path / "t.csv"))
    assert seen == ["a.png", "b", "a.png"]


@pytest.mark.parametrize("block", [False, True])
def test_a_dataset_takes_its_captions_from_the_table(tmp_path: Path, block: bool) -> None:
    folder = tmp_path / "photos"
    (folder / "inside").mkdir(parents=True)
    for name in IMAGES:
        (folder / name).write_bytes(PNG)
    (folder / "a.txt").write_text("not this one", encoding="utf-8")
    write_table(folder / "t.jsonl")
    options = DataOptions(missing_caption="drop", resolution=64, max_bad_sample_fraction=1)
    fallback = {"path": "photos/t.jsonl", "fallback_caption_column": "tags", "width_column": "w"}
    fields = {"parquet": fallback} if block else {"caption_table": fallback}
    strategy = "parquet" if block else "jsonl"
    entry = {"id": "p", "instance_data_dir": "photos", "caption_strategy": strategy, **fields}
    file = tmp_path / "multidatabackend.json"
    file.write_text(json.dumps([entry]), encoding="utf-8")
    found = read_dataset_file(file, options, {})
    placed = scan_datasets(found.train, options, 0, lambda event: None, alignment_px=64)
    assert {item.sample.id: item.sample.captions for item in placed.samples} == {
        f"p/{path}": captions for path, captions in EXPECTED.items()
    }
    (rejected,) = placed.rejected
    assert (rejected.path, rejected.reason) == ("c.png", "caption_dropped")
    assert rejected.detail == "t.jsonl has no caption for it"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "caption_table: is missing: caption_strategy csv reads captions from a table"),
        ({"caption_table": "none.csv"}, '"none.csv" is not a file'),
        ({"caption_table": {"path": "t.csv", "columns": 1}}, "columns: unknown; it takes path"),
        ({"caption_table": {"path": 3}}, "path = 3 must be text"),
        ({"parquet": {"path": "t.csv", "caption_column": 3}}, "must be a name or a list of names"),
        ({"parquet": 3.5, "caption_strategy": "textfile"}, ""),
    ],
)
def test_a_field_that_is_wrong_is_refused(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    (tmp_path / "photos").mkdir()
    write_table(tmp_path / "t.csv")
    entry = {"id": "p", "instance_data_dir": "photos", "caption_strategy": "csv", **fields}
    file = tmp_path / "multidatabackend.json"
    file.write_text(json.dumps([entry]), encoding="utf-8")
    if not words:
        assert read_dataset_file(file, DataOptions(), {}).notices
        return
    with pytest.raises(ConfigError) as caught:
        read_dataset_file(file, DataOptions(), {})
    assert words in str(caught.value)
