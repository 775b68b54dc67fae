"""The content of a folder, the crop that training uses, and counts of read images only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.data.scan import scan_datasets
from simpletuner.errors import DataError
from simpletuner.server import image_index
from simpletuner.server.api_errors import ApiError
from simpletuner.server.dataset_items import CropSettings
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.folder_browser import list_folder
from simpletuner.server.schemas.datasets import DatasetInfo
from simpletuner.server.workspace import PathOutsideWorkspace
from tests.data.unusable_files import encode_image, png_header
from tests.quick import assert_quick
from tests.server.dataset_app import PNG, make_workspace

FRAMINGS = [
    ResizeCropConfig(crop=True, crop_aspect="preserve"),
    ResizeCropConfig(resolution=512, crop=True, crop_aspect="square", crop_style="random"),
    ResizeCropConfig(
        resolution=0.5,
        resolution_type="area",
        crop=True,
        crop_aspect="closest",
        crop_style="corner",
    ),
    ResizeCropConfig(resolution=300, resolution_type="pixel"),
]


def filled(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, size in enumerate([(640, 480), (480, 640), (333, 777), (1000, 1001), (64, 64)]):
        Image.new("RGB", size).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\nsaid otherwise\n")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200)).save(folder / "turned.jpg", exif=exif)
    (folder / "turned.txt").write_text("  \n")
    (folder / "broken.png").write_bytes(b"<html>")
    (folder / "wide.png").write_bytes(png_header(900, 100))
    (folder / "inner").mkdir()
    Image.new("RGB", (100, 100)).save(folder / "inner" / "latin.png")
    (folder / "inner" / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    return folder


def settled(
    datasets: DatasetService, name: str, holds: Callable[[DatasetInfo], bool]
) -> DatasetInfo:
    end = time.monotonic() + 240
    while not holds(found := datasets.get_info(name)):
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def test_counts_and_filters(tmp_path: Path) -> None:
    where = make_workspace(tmp_path / "w")
    filled(where.datasets_dir / "photos")
    datasets = DatasetService(where)
    info = settled(datasets, "photos", lambda info: not info.unread)
    assert (info.pictures, info.captioned, info.refused, info.owned) == (9, 5, 3, True)
    assert info.size_bytes == sum(
        path.stat().st_size
        for path in (where.datasets_dir / "photos").rglob("*")
        if path.suffix in (".png", ".jpg")
    )
    shown = {
        only: [
            item.file for item in datasets.list_items("photos", 0, 60, only, CropSettings()).items
        ]
        for only in ("all", "captioned", "uncaptioned", "refused")
    }
    assert shown["uncaptioned"] == ["turned.jpg"]
    assert shown["refused"] == ["broken.png", "inner/latin.png", "wide.png"]
    assert sorted(shown["captioned"] + shown["uncaptioned"] + shown["refused"]) == shown["all"]
    by_name = {
        item.file: item
        for item in datasets.list_items("photos", 0, 60, "all", CropSettings()).items
    }
    assert (by_name["turned.jpg"].width_px, by_name["turned.jpg"].height_px) == (200, 300)
    assert by_name["turned.jpg"].caption_text == "  \n"
    assert by_name["0.png"].captions == ["picture 0", "said otherwise"]
    assert by_name["0.png"].caption_text == "picture 0\nsaid otherwise\n"
    assert "UTF-8" in (by_name["inner/latin.png"].refused or "")
    assert by_name["inner/latin.png"].caption_text is None
    assert "aspect" in (by_name["wide.png"].refused or "")
    assert by_name["wide.png"].crop_px is None
    page = datasets.list_items("photos", 7, 60, "all", CropSettings())
    assert (page.total, page.offset, len(page.items)) == (9, 7, 2)


@pytest.mark.parametrize(
    "framing", FRAMINGS, ids=lambda framing: framing.crop_aspect + framing.resolution_type
)
def test_cut_as_the_scan_of_a_training_cuts(tmp_path: Path, framing: ResizeCropConfig) -> None:
    where = make_workspace(tmp_path / "w")
    folder = filled(where.datasets_dir / "photos")
    options = DataOptions(missing_caption="empty", max_bad_sample_fraction=1.0)
    placed = {
        one.sample.id.partition("/")[2]: one
        for one in scan_datasets(
            [DatasetConfig("photos", "image", folder, framing)], options, 7, lambda _: None
        ).samples
    }
    datasets, view = DatasetService(where), CropSettings(framing, seed=7)
    settled(datasets, "photos", lambda info: not info.unread)
    items = {item.file: item for item in datasets.list_items("photos", 0, 60, "all", view).items}
    assert {name for name, item in items.items() if item.refused is None} == placed.keys()
    for name, one in placed.items():
        item = items[name]
        assert item.bucket_px == one.bucket_px
        assert item.crop_px is not None
        left, top, width, height = item.crop_px
        scale = one.resize_px[0] / item.width_px, one.resize_px[1] / item.height_px
        assert abs(left * scale[0] - one.crop_px[0]) <= scale[0]
        assert abs(top * scale[1] - one.crop_px[1]) <= scale[1]
        assert abs(width * scale[0] - one.bucket_px[0]) <= 2 * scale[0]
        assert 0 <= left < left + width <= item.width_px
        assert 0 <= top < top + height <= item.height_px
    counted = Counter(one.bucket_px for one in placed.values())
    buckets = datasets.count_buckets("photos", view)
    assert {(one.width_px, one.height_px): one.pictures for one in buckets} == counted


def test_changes_are_seen(tmp_path: Path) -> None:
    where = make_workspace(tmp_path / "w")
    folder = filled(where.datasets_dir / "photos")
    datasets = DatasetService(where)
    settled(datasets, "photos", lambda info: info.pictures == 9 and not info.unread)
    (folder / "new").mkdir()
    (folder / "new" / "one.png").write_bytes(PNG)
    settled(datasets, "photos", lambda info: info.pictures == 10 and not info.unread)
    (folder / "new" / "one.txt").write_text("said")
    settled(datasets, "photos", lambda info: info.captioned == 6)
    (folder / "0.png").unlink()
    settled(datasets, "photos", lambda info: (info.pictures, info.captioned) == (9, 5))
    (folder / "1.txt").write_text("")  # in place: no folder changes, yet the page shows it
    (item,) = [
        one
        for one in datasets.list_items("photos", 0, 60, "all", CropSettings()).items
        if one.file == "1.png"
    ]
    assert item.captions == []
    assert [
        one.file for one in datasets.list_items("photos", 0, 9, "uncaptioned", CropSettings()).items
    ] == [
        "1.png",
        "turned.jpg",
    ]


def test_a_caption_does_not_hide_what_was_uploaded_meanwhile(tmp_path: Path) -> None:
    where = make_workspace(tmp_path / "w")
    folder = filled(where.datasets_dir / "photos")
    datasets = DatasetService(where)
    settled(datasets, "photos", lambda info: not info.unread)
    read = datasets._refreshed_index("photos")
    (folder / "more.png").write_bytes(PNG)
    datasets.invalidate("photos")
    read.caption_changed(folder / "0.txt")
    assert datasets.get_info("photos").pictures == 10


def test_in_place_changes_are_counted_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_index, "RESCAN_AFTER_S", 0.05)
    where = make_workspace(tmp_path / "w")
    folder = filled(where.datasets_dir / "photos")
    datasets = DatasetService(where)
    settled(datasets, "photos", lambda info: info.captioned == 5)
    (folder / "1.txt").write_text("")
    settled(datasets, "photos", lambda info: info.captioned == 4)


def test_headers_are_kept_for_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = make_workspace(tmp_path / "w")
    folder = filled(where.datasets_dir / "photos")
    read: list[str] = []
    real = image_index.read_image_header
    monkeypatch.setattr(
        image_index,
        "read_image_header",
        lambda path, most: read.append(path.name) or real(path, most),
    )
    first = settled(DatasetService(where), "photos", lambda info: not info.unread)
    kept = where.server_dir / "datasets" / "photos.json"
    end = time.monotonic() + 240
    while not kept.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert len(read) == 9
    read.clear()
    os.utime(folder / "2.png", ns=(1, 1))
    assert settled(DatasetService(where), "photos", lambda info: not info.unread) == first
    assert sorted(set(read)) == ["2.png", "broken.png"]  # what changed, and what could not be read
    kept.write_text("{ damaged")
    assert settled(DatasetService(where), "photos", lambda info: not info.unread) == first


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_pictures(tmp_path: Path, count: int) -> None:
    where = make_workspace(tmp_path / "w")
    folder = where.datasets_dir / "many"
    folder.mkdir(parents=True)
    heads = [png_header(400 + 8 * kind, 600) for kind in range(30)]
    for number in range(count):
        descriptor = os.open(folder / f"{number:05}.png", os.O_CREAT | os.O_WRONLY)
        os.write(descriptor, heads[number % 30])
        os.close(descriptor)
    (folder / "00007.txt").write_text("the only one that says something")
    datasets = DatasetService(where)
    first = datasets.list_items("many", count - 1_000, 60, "all", CropSettings())
    assert first.total == count  # by name, at once
    assert [item.file for item in first.items] == [
        f"{number:05}.png" for number in range(count - 1_000, count - 940)
    ]
    assert all(item.crop_px is not None for item in first.items)  # a page is always read
    info = datasets.get_info("many")
    assert info.captioned + info.refused + info.unread <= info.pictures == count
    settled(datasets, "many", lambda info: not info.unread)
    for offset in (0, count // 3, count - 60):
        page = datasets.list_items("many", offset, 60, "uncaptioned", CropSettings())
        assert (page.total, len(page.items), page.unread) == (
            count - 1,
            59 if offset == count - 60 else 60,
            0,
        )
    middle = ("many", count // 3, 60, "uncaptioned", CropSettings())
    assert_quick(lambda: datasets.list_items(*middle), 0.1)
    assert (
        sum(bucket.pictures for bucket in datasets.count_buckets("many", CropSettings())) == count
    )
    assert datasets.list_items("many", 0, 60, "captioned", CropSettings()).total == 1


def test_make_and_add(tmp_path: Path) -> None:
    outside, allowed = tmp_path / "private", tmp_path / "pictures"
    filled(outside / "a")
    filled(allowed / "cats")
    where = make_workspace(tmp_path / "w", allowed)
    datasets = DatasetService(where)
    assert datasets.list_datasets() == []
    assert datasets.create("new", None).owned
    added = datasets.create("cats", str(allowed / "cats"))
    assert (added.owned, added.path) == (False, str((allowed / "cats").resolve()))
    assert [info.name for info in DatasetService(where).list_datasets()] == ["cats", "new"]
    for path in (outside / "a", "/etc", allowed / ".." / "private" / "a", "../private/a"):
        with pytest.raises(PathOutsideWorkspace):
            datasets.create("x", str(path))
    (allowed / "out").symlink_to(outside)
    with pytest.raises(PathOutsideWorkspace):
        datasets.create("x", str(allowed / "out" / "a"))
    for name, path, status in [
        ("new", None, 409),
        ("cats", None, 409),
        ("", None, 422),
        (".hidden", None, 422),
        ("a/b", None, 422),
        ("..", None, 422),
        ("a" * 65, None, 422),
        ("é", None, 422),
        ("a\n", None, 422),
        ("a b", None, 422),
        ("x", str(allowed / "none"), 422),
        ("x", str(where.root), 422),
        ("x", str(where.server_dir), 422),
        ("x", str(allowed / "cats" / "0.png"), 422),
    ]:
        with pytest.raises(ApiError) as caught:
            datasets.create(name, path)
        assert caught.value.status == status, name
    assert [
        info.name for info in DatasetService(make_workspace(tmp_path / "w")).list_datasets()
    ] == ["new"]  # the root is not allowed now
    for name in ("none", "../w", ".."):
        with pytest.raises(ApiError) as caught:
            datasets.get_info(name)
        assert caught.value.status == 404


def test_links_that_lead_out_show_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    filled(secret)
    where = make_workspace(tmp_path / "w")
    folder = where.datasets_dir / "photos"
    folder.mkdir(parents=True)
    (folder / "linked").symlink_to(secret)
    (folder / "one.png").symlink_to(secret / "0.png")
    (folder / "two.png").write_bytes(PNG)
    (folder / "two.txt").symlink_to(secret / "0.txt")
    (where.datasets_dir / "whole").symlink_to(secret)
    datasets = DatasetService(where)
    assert [info.name for info in datasets.list_datasets()] == ["photos"]
    info = settled(datasets, "photos", lambda info: not info.unread)
    assert info.refused == info.pictures == 11
    page = datasets.list_items("photos", 0, 60, "all", CropSettings()).items
    assert {item.width_px for item in page} == {0}
    assert {item.caption_text for item in page} == {None}
    assert {tuple(item.captions) for item in page} == {()}
    for file in ("one.png", "linked/0.png"):
        with pytest.raises(PathOutsideWorkspace):
            datasets.image_path("photos", file)


def test_only_pictures_are_handed_out(tmp_path: Path) -> None:
    where = make_workspace(tmp_path / "w")
    folder = filled(where.datasets_dir / "photos")
    datasets = DatasetService(where)
    assert datasets.image_path("photos", "inner/latin.png") == folder / "inner" / "latin.png"
    for file in (
        "0.txt",
        "../photos/0.png",
        "./0.png",
        "inner",
        "",
        "none.png",
        "0.png\0",
        str(folder / "0.png"),
    ):
        with pytest.raises(ApiError) as caught:
            datasets.image_path("photos", file)
        assert caught.value.status == 404


def test_a_folder_that_cannot_be_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(_: object) -> None:
        raise DataError("photos: Permission denied")

    where = make_workspace(tmp_path / "w")
    filled(where.datasets_dir / "photos")
    datasets = DatasetService(where)
    with monkeypatch.context() as patch:
        patch.setattr(image_index, "find_image_files", denied)
        with pytest.raises(DataError, match="Permission"):
            datasets.get_info("photos")
        (listed,) = datasets.list_datasets()
        assert (listed.pictures, listed.problem) == (0, "photos: Permission denied")
    settled(datasets, "photos", lambda info: info.pictures == 9)


def test_folders(tmp_path: Path) -> None:
    allowed = tmp_path / "pictures"
    filled(allowed / "cats")
    (allowed / ".hidden").mkdir()
    (allowed / "out").symlink_to("/etc")
    where = make_workspace(tmp_path / "w", allowed)
    datasets = DatasetService(where)
    assert list_folder(datasets.workspace, "").folders == [str(where.root), str(allowed.resolve())]
    assert list_folder(datasets.workspace, str(allowed)).folders == [
        str(allowed.resolve() / "cats")
    ]
    cats = list_folder(datasets.workspace, str(allowed / "cats"))
    assert (cats.folders, cats.pictures) == ([str(allowed.resolve() / "cats" / "inner")], 8)
    for path in ("/", "/etc", str(tmp_path), "..", str(allowed / "out"), "a\0"):
        with pytest.raises(PathOutsideWorkspace):
            list_folder(datasets.workspace, path)
    for path in (str(allowed / "none"), str(allowed / "cats" / "0.png"), ".simpletuner"):
        with pytest.raises(ApiError):
            list_folder(datasets.workspace, path)


def test_importing_brings_neither_numpy_nor_pillow() -> None:
    code = (
        "import sys, simpletuner.server.api.datasets as _, simpletuner.server.dataset_service as _;"
        "print([name for name in ('numpy', 'PIL', 'torch') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    code = "import sys, simpletuner.server.image_index as _; print('numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_identical_and_tiny_images_are_found(tmp_path: Path) -> None:
    where = make_workspace(tmp_path / "w")
    folder = where.datasets_dir / "a"
    (folder / "sub").mkdir(parents=True)
    large = encode_image(Image.effect_noise((300, 300), 50).convert("RGB"), "PNG")
    for name, content in (("one.png", PNG), ("two.png", large), ("sub/copy.png", large)):
        (folder / name).write_bytes(content)
    service = DatasetService(where)
    found = service.findings("a")
    assert found.duplicates == [["sub/copy.png", "two.png"]]
    assert found.small == ["one.png"]

    def page(only: str) -> list[str]:
        return [one.file for one in service.list_items("a", 0, 9, only, CropSettings()).items]

    assert page("duplicate") == ["sub/copy.png", "two.png"]
    assert page("small") == ["one.png"]
