"""Captions are written over what their writer saw and over nothing else; the old text is kept."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from simpletuner.server.api_errors import ApiError
from simpletuner.server.caption_files import MAX_CAPTION_CHARS, read_caption
from simpletuner.server.dataset_items import CropSettings
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.schemas.datasets import CaptionWrite, DatasetItem
from simpletuner.server.workspace import PathOutsideWorkspace
from tests.server.dataset_app import PNG, make_workspace


@pytest.fixture
def photos(tmp_path: Path) -> DatasetService:
    where = make_workspace(tmp_path / "w")
    folder = where.datasets_dir / "photos"
    (folder / "in").mkdir(parents=True)
    for name in ("a.png", "b.png", "in/c.v2.png"):
        (folder / name).write_bytes(PNG)
    (folder / "a.txt").write_bytes(b"first\r\nsecond")
    return DatasetService(where)


def folder(datasets: DatasetService) -> Path:
    return datasets.workspace.datasets_dir / "photos"


def write(datasets: DatasetService, file: str, text: str, before: str | None) -> DatasetItem:
    page = datasets.write_caption(
        "photos", file, CaptionWrite(text=text, before=before), CropSettings()
    )
    assert (page.total, len(page.items)) == (1, 1)
    return page.items[0]


def trash(datasets: DatasetService) -> list[bytes]:
    found = (
        path for path in (datasets.workspace.server_dir / "trash").rglob("*") if path.is_file()
    )
    return sorted(path.read_bytes() for path in found)


def test_write_and_undo(photos: DatasetService) -> None:
    seen = photos.list_items("photos", 0, 9, "all", CropSettings()).items[0]
    item = write(photos, "a.png", "a new one", seen.caption_text)
    assert (item.caption_text, item.captions) == ("a new one", ["a new one"])
    assert trash(photos) == [b"first\r\nsecond"]
    write(photos, "a.png", seen.caption_text or "", "a new one")
    assert (folder(photos) / "a.txt").read_bytes() == b"first\r\nsecond"
    assert trash(photos) == [b"a new one", b"first\r\nsecond"]


def test_the_first_caption_and_its_undoing(photos: DatasetService) -> None:
    assert write(photos, "in/c.v2.png", "said नमस्ते", None).captions == ["said नमस्ते"]
    assert (folder(photos) / "in" / "c.v2.txt").read_text(encoding="utf-8") == "said नमस्ते"
    assert photos.get_info("photos").captioned == 2
    assert write(photos, "in/c.v2.png", "", "said नमस्ते").caption_text is None
    assert not (folder(photos) / "in" / "c.v2.txt").exists()
    assert photos.get_info("photos").captioned == 1
    assert trash(photos) == ["said नमस्ते".encode()]


def test_another_text_there_is_not_overwritten(photos: DatasetService) -> None:
    for file, before in (
        ("a.png", None),
        ("a.png", "first"),
        ("b.png", "something"),
        ("b.png", ""),
    ):
        with pytest.raises(ApiError) as caught:
            write(photos, file, "mine", before)
        assert caught.value.status == 409
    assert (folder(photos) / "a.txt").read_bytes() == b"first\r\nsecond"
    assert not (folder(photos) / "b.txt").exists()
    assert trash(photos) == []


def test_of_many_writers_who_saw_the_same_one_wins(photos: DatasetService) -> None:
    results: list[str] = []

    def attempt(text: str) -> None:
        try:
            write(photos, "b.png", text, None)
            results.append(text)
        except ApiError:
            results.append("")

    threads = [threading.Thread(target=attempt, args=(f"text {number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (winner,) = [text for text in results if text]
    assert len(results) == 8
    assert read_caption(folder(photos) / "b.txt") == winner


def test_an_unreadable_text_can_be_replaced_and_is_kept(photos: DatasetService) -> None:
    (folder(photos) / "b.txt").write_bytes(b"caf\xe9")
    assert write(photos, "b.png", "coffee", None).captions == ["coffee"]
    assert trash(photos) == [b"caf\xe9"]


def test_a_full_or_locked_disk_is_told(
    photos: DatasetService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("simpletuner.server.caption_files.write_atomically", full)
    with pytest.raises(OSError, match="Read-only"):
        write(photos, "a.png", "new", "first\r\nsecond")
    assert (folder(photos) / "a.txt").read_bytes() == b"first\r\nsecond"


def test_upper_case_suffix_is_written_in_place(photos: DatasetService) -> None:
    (folder(photos) / "b.TXT").write_text("old")
    assert write(photos, "b.png", "new", "old").captions == ["new"]
    assert not (folder(photos) / "b.txt").exists()


@pytest.mark.parametrize("text", ["x" * (MAX_CAPTION_CHARS + 1), "a\0b"])
def test_texts_that_are_no_captions(photos: DatasetService, text: str) -> None:
    with pytest.raises(ApiError) as caught:
        write(photos, "b.png", text, None)
    assert (caught.value.status, caught.value.details[0].loc) == (422, "text")


def test_half_a_surrogate_is_no_caption(photos: DatasetService) -> None:
    """The check of requests refuses it, which the API answers with 422."""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        write(photos, "b.png", "\ud800", None)


@pytest.mark.parametrize("file", ["none.png", "a.txt", "../photos/a.png", "", "in", "/etc/passwd"])
def test_only_beside_a_picture_of_the_dataset(photos: DatasetService, file: str) -> None:
    with pytest.raises(ApiError) as caught:
        write(photos, file, "x", None)
    assert caught.value.status == 404


def test_never_through_a_link_that_leads_out(photos: DatasetService, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (folder(photos) / "b.txt").symlink_to(secret)
    with pytest.raises(PathOutsideWorkspace):
        write(photos, "b.png", "x", "secret")
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "d.png").write_bytes(PNG)
    (folder(photos) / "out").symlink_to(tmp_path / "away")
    with pytest.raises(PathOutsideWorkspace):
        write(photos, "out/d.png", "x", None)
    assert secret.read_text() == "secret"
    assert [path.name for path in (tmp_path / "away").iterdir()] == ["d.png"]


def test_in_a_folder_that_was_added(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").write_bytes(PNG)
    datasets = DatasetService(make_workspace(tmp_path / "w", tmp_path / "mine"))
    datasets.create("mine", str(tmp_path / "mine"))
    page = datasets.write_caption(
        "mine", "a.png", CaptionWrite(text="a cat", before=None), CropSettings()
    )
    assert page.items[0].captions == ["a cat"]
    assert (tmp_path / "mine" / "a.txt").read_text() == "a cat"
