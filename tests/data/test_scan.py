from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.crop_assignment import assign_bucket
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.duplicates import find_identical_files
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.scan import scan_datasets
from simpletuner.data.sources import LocalFile
from simpletuner.errors import DataError
from simpletuner.events.event_types import (
    DatasetScanned,
    Event,
    NoticeIssued,
    StageCompleted,
    StageStarted,
    WarningIssued,
)
from tests.data.unusable_files import encode_image, noise_image, write_sample
from tests.unicode_names import needs_unicode_names

MakeDataset = Callable[..., DatasetConfig]
PNG = encode_image(noise_image(), "PNG")


def ignore(event: Event) -> None:
    """An Emit for tests that do not look at events."""


def said(dataset: DatasetConfig, options: DataOptions) -> dict[str, tuple[str, ...]]:
    return {
        placed.sample.id: placed.sample.captions
        for placed in scan_datasets([dataset], options, 1, ignore).samples
    }


def test_ids_order_hidden_files_and_events(dataset: MakeDataset, options: DataOptions) -> None:
    photos = dataset()
    root = photos.instance_data_dir
    for name in ("b.png", "a/z.png", "a/.hidden.png", ".git/c.png", "a.png"):
        (root / name).parent.mkdir(exist_ok=True)
        write_sample(root, name, encode_image(noise_image((96, 64 + len(name))), "PNG"))
    (root / "loop").symlink_to(root)
    (root / "notes.md").write_text("not a picture")
    events: list[Event] = []
    result = scan_datasets([photos], options, 1, events.append)
    assert [placed.sample.id for placed in result.samples] == [
        "photos/a.png",
        "photos/a/z.png",
        "photos/b.png",
    ]
    assert result.rejected == ()
    assert events[0] == StageStarted("scan", 3, "images")
    assert isinstance(events[1], StageCompleted)
    assert events[2] == DatasetScanned("photos", 3, ((128, 128, 3),), {})


def test_textfile_captions(dataset: MakeDataset, options: DataOptions) -> None:
    photos = dataset()
    write_sample(
        photos.instance_data_dir, "x.png", PNG, b"\xef\xbb\xbf one \r\n\r\ntwo, caf\xc3\xa9\n"
    )
    assert said(photos, options) == {"photos/x.png": ("one", "two, caf\u00e9")}
    whole = dataset(disable_multiline_split=True)
    assert said(whole, options) == {"photos/x.png": ("one \n\ntwo, caf\u00e9",)}
    before = dataset(prepend_instance_prompt=True, instance_prompts=("a", "b"))
    assert said(before, options)["photos/x.png"] == (
        "a one",
        "a two, caf\u00e9",
        "b one",
        "b two, caf\u00e9",
    )
    only = dataset(only_instance_prompt=True, instance_prompts=("a", "b"))
    assert said(only, options) == {"photos/x.png": ("a", "b")}
    held = dataset(dataset_type="eval")
    assert said(held, options) == {"photos/x.png": ("one",)}


def test_other_captions(dataset: MakeDataset, options: DataOptions) -> None:
    photos = dataset(caption_strategy="filename")
    write_sample(photos.instance_data_dir, "a_red__ball.v2.png", PNG, None)
    assert said(photos, options) == {"photos/a_red__ball.v2.png": ("a red ball.v2",)}
    prompted = dataset(caption_strategy="instanceprompt", instance_prompts=("sks",))
    assert said(prompted, options) == {"photos/a_red__ball.v2.png": ("sks",)}


def test_a_caption_is_found_by_the_whole_stem_in_any_case_of_its_suffix(
    dataset: MakeDataset, options: DataOptions
) -> None:
    photos = dataset()
    for number, name in enumerate(("IMG 1.v2.JPG", "b.c.png")):
        write_sample(
            photos.instance_data_dir,
            name,
            encode_image(noise_image((64, 64 + number)), "PNG"),
            None,
        )
    for name in ("IMG 1.v2.TXT", "b.c.Txt", "b.c.txt", "b.txt"):
        (photos.instance_data_dir / name).write_text(name)
    (photos.instance_data_dir / "raw.CR2").write_bytes(b"")
    events: list[Event] = []
    found = {
        one.sample.id: one.sample.captions
        for one in scan_datasets([photos], options, 1, events.append).samples
    }
    assert found == {"photos/IMG 1.v2.JPG": ("IMG 1.v2.TXT",), "photos/b.c.png": ("b.c.txt",)}
    notes = [event.message for event in events if isinstance(event, NoticeIssued)]
    assert notes[-1] == (
        "photos: skipped 2 files that cannot be used: 1 .cr2, 1 .txt without an image"
    )


def test_enlarged_and_shared_pictures_are_told(dataset: MakeDataset, options: DataOptions) -> None:
    photos = dataset()
    (photos.instance_data_dir / "in").mkdir()
    write_sample(photos.instance_data_dir, "big.png", encode_image(noise_image((128, 128)), "PNG"))
    write_sample(
        photos.instance_data_dir, "in/tiny.png", encode_image(noise_image((10, 10)), "PNG")
    )
    inner = dataset("inner", instance_data_dir=photos.instance_data_dir / "in")
    events: list[Event] = []
    scan_datasets([photos, inner], options, 1, events.append)
    notes = [event.message for event in events if isinstance(event, NoticeIssued)]
    assert notes[:2] == [
        f"{name}: 1 image is enlarged, tiny.png by 12.8; see minimum_image_size"
        for name in ("photos", "inner")
    ]
    assert notes[2].startswith("1 image is in more than one dataset, such as ")


def test_a_file_that_vanishes_during_the_scan_is_no_copy(
    dataset: MakeDataset, options: DataOptions, tmp_path: Path
) -> None:
    for name, content in {"a": b"x", "b": b"x", "c": b"y"}.items():
        (tmp_path / name).write_bytes(content * 9000)
    (tmp_path / "d").write_bytes(b"z" + b"x" * 8999)  # the same length and end
    files = [LocalFile(tmp_path / name) for name in ("a", "b", "c", "d", "gone")]
    assert find_identical_files(files) == [files[:2]]


def test_held_out_pictures_alone_are_nothing_to_train_on(
    dataset: MakeDataset, options: DataOptions, tmp_path: Path
) -> None:
    photos = dataset(resize_crop=ResizeCropConfig(resolution=128, minimum_image_size=2000))
    write_sample(photos.instance_data_dir, "a.png", PNG)
    held = dataset("held", dataset_type="eval")
    with pytest.raises(DataError, match="there is no image to train on"):
        scan_datasets([photos, held], options, 1, ignore)


@needs_unicode_names
def test_a_caption_is_found_across_unicode_spellings(
    dataset: MakeDataset, options: DataOptions
) -> None:
    photos = dataset()
    write_sample(photos.instance_data_dir, unicodedata.normalize("NFC", "\u00e9.png"), PNG, None)
    (photos.instance_data_dir / unicodedata.normalize("NFD", "\u00e9.txt")).write_text("accent")
    assert said(photos, options) == {"photos/\u00e9.png": ("accent",)}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("empty", ("",)), ("filename", ("x y",)), ("drop", None), ("error", None)],
)
def test_missing_captions(policy, expected, dataset: MakeDataset, tmp_path: Path) -> None:
    photos = dataset()
    write_sample(photos.instance_data_dir, "good.png", PNG)
    for number in range(30):
        write_sample(photos.instance_data_dir, f"{number:02}.png", PNG, None)
    write_sample(photos.instance_data_dir, "x_y.png", PNG, b"\n")
    options = DataOptions(missing_caption=policy)
    listed = tmp_path / "out" / "rejected.jsonl"
    if policy == "error":
        with pytest.raises(DataError) as error:
            scan_datasets([photos], options, 1, ignore, rejected_path=listed)
        lines = str(error.value).splitlines()
        assert lines[0].startswith("31 images have no caption.")
        assert lines[1] == "  photos/00.png: there is no 00.txt next to it"
        assert lines[21:] == ["  and 11 more", f"Complete list: {listed}"]
        rows = [json.loads(line) for line in listed.read_text().splitlines()]
        assert len(rows) == 31
        assert rows[-1] == {
            "path": "x_y.png", "dataset": "photos", "reason": "caption_missing", "detail": "x_y.txt is empty",
        }  # fmt: skip
        return
    result = scan_datasets([photos], options, 1, ignore)
    found = {placed.sample.id: placed.sample.captions for placed in result.samples}
    assert found.get("photos/x_y.png") == expected
    assert len(result.rejected) == (31 if policy == "drop" else 0)


def test_file_names_cannot_write_to_the_terminal(
    dataset: MakeDataset, options: DataOptions
) -> None:
    photos = dataset()
    for name in ("a\n\x1b[2J.png", "b\n\x1b[2J.png"):
        write_sample(photos.instance_data_dir, name, PNG)
    (photos.instance_data_dir / "c.\x1b]0;x").write_bytes(b"")
    events: list[Event] = []
    scan_datasets([photos, dataset("again")], options, 1, events.append)
    messages = [
        event.message for event in events if isinstance(event, (NoticeIssued, WarningIssued))
    ]
    assert len(messages) == 6
    (photos.instance_data_dir / "a\n\x1b[2J.txt").unlink()
    with pytest.raises(DataError) as error:
        scan_datasets([photos], options, 1, ignore)
    assert r"photos/a\n\x1b[2J.png: there is no a\n\x1b[2J.txt next to it" in str(error.value)
    assert all(message.isprintable() for message in [*messages, *str(error.value).splitlines()])


def test_filters_are_not_bad_samples(dataset: MakeDataset) -> None:
    framing = ResizeCropConfig(
        resolution=128, minimum_image_size=80, maximum_aspect_ratio=2, minimum_aspect_ratio=1
    )
    photos = dataset(resize_crop=framing)
    for name, size in {
        "ok": (160, 80),
        "wide": (161, 80),
        "tall": (90, 91),
        "small": (80, 79),
    }.items():
        write_sample(
            photos.instance_data_dir, f"{name}.png", encode_image(noise_image(size), "PNG")
        )
    result = scan_datasets([photos], DataOptions(max_bad_sample_fraction=0), 1, ignore)
    assert [placed.sample.id for placed in result.samples] == ["photos/ok.png"]
    assert {item.path: item.reason for item in result.rejected} == {
        "wide.png": "aspect_ratio", "tall.png": "aspect_ratio", "small.png": "too_small",
    }  # fmt: skip


@pytest.mark.parametrize(("fraction", "refused"), [(0.19, True), (0.2, False)])
def test_too_many_bad_samples(fraction, refused, dataset: MakeDataset) -> None:
    photos = dataset()
    for number in range(4):
        write_sample(
            photos.instance_data_dir,
            f"{number}.png",
            encode_image(noise_image((64 + number, 64)), "PNG"),
        )
    write_sample(photos.instance_data_dir, "bad.png", b"")
    options = DataOptions(max_bad_sample_fraction=fraction)
    if refused:
        with pytest.raises(DataError, match=r"1 of 5 images cannot be used \(1 empty_file\)"):
            scan_datasets([photos], options, 1, ignore)
    else:
        assert len(scan_datasets([photos], options, 1, ignore).samples) == 4


def test_empty_folder_and_nothing_left(dataset: MakeDataset, options: DataOptions) -> None:
    photos = dataset()
    (photos.instance_data_dir / "x.psb").write_bytes(b"")
    with pytest.raises(DataError, match=r"photos: no images in .*, only 1 \.psb"):
        scan_datasets([photos], options, 1, ignore)
    write_sample(photos.instance_data_dir, "x.png", encode_image(noise_image((1, 300)), "PNG"))
    with pytest.raises(
        DataError, match=r"there is no image to train on(.|\n)*x.png: 1x300 has aspect"
    ):
        scan_datasets([photos], options, 1, ignore)


def test_subset_depends_on_names_alone(dataset: MakeDataset, options: DataOptions) -> None:
    photos = dataset(max_num_samples=5)
    for number in range(12):
        write_sample(
            photos.instance_data_dir,
            f"{number}.png",
            encode_image(noise_image((64 + number, 64)), "PNG"),
        )
    first = set(said(photos, options))
    assert len(first) == 5
    assert first == {item.sample.id for item in scan_datasets([photos], options, 2, ignore).samples}
    write_sample(photos.instance_data_dir, "new.png", PNG)
    assert len(first & set(said(photos, options))) >= 4
    assert set(said(dataset("other", max_num_samples=5), options)) != {
        name.replace("photos", "other") for name in first
    }


def test_random_crops_follow_the_seed_and_eval_is_centred(
    dataset: MakeDataset, options: DataOptions
) -> None:
    random = dataset(resize_crop=ResizeCropConfig(resolution=64, crop=True, crop_style="random"))
    for number in range(8):
        write_sample(
            random.instance_data_dir,
            f"{number}.png",
            encode_image(noise_image((160, 64 + number)), "PNG"),
        )
    crops = [
        [item.crop_px for item in scan_datasets([random], options, seed, ignore).samples]
        for seed in (1, 1, 2)
    ]
    assert crops[0] == crops[1] != crops[2]
    assert len(set(crops[0])) > 3


def test_alignment_is_the_models(dataset: MakeDataset, options: DataOptions) -> None:
    photos = dataset(resize_crop=ResizeCropConfig(resolution=80))
    write_sample(photos.instance_data_dir, "x.png", encode_image(noise_image((80, 80)), "PNG"))
    assert scan_datasets([photos], options, 1, ignore, alignment_px=16).samples[0].bucket_px == (
        80,
        80,
    )
    assert scan_datasets([photos], options, 1, ignore).samples[0].bucket_px == (64, 64)


def test_copies_are_told_and_leaks_refused(
    dataset: MakeDataset, options: DataOptions, tmp_path: Path
) -> None:
    photos = dataset()
    write_sample(photos.instance_data_dir, "a.png", PNG)
    write_sample(photos.instance_data_dir, "b.png", PNG)
    write_sample(photos.instance_data_dir, "c.png", encode_image(noise_image((64, 64)), "PNG"))
    events: list[Event] = []
    result = scan_datasets([photos, dataset("again")], options, 1, events.append)
    ids = [placed.sample.id for placed in result.samples]
    assert ids == sorted(ids)
    assert ids[0].startswith("again/")
    warned = [event.message for event in events if isinstance(event, WarningIssued)]
    assert warned == ["1 image is a copy of another, such as b.png of a.png"]
    held = tmp_path / "held"
    held.mkdir()
    write_sample(held, "new.png", encode_image(noise_image((72, 64)), "PNG"))
    watch = dataset("held", dataset_type="eval", instance_data_dir=held)
    assert len(scan_datasets([photos, watch], options, 1, ignore).samples) == 4
    shutil.copy(photos.instance_data_dir / "b.png", held / "copy.png")
    write_sample(held, "copy.png", PNG)
    with pytest.raises(
        DataError, match=r"1 image of an eval dataset(.|\n)*held/copy.png is photos/a.png"
    ):
        scan_datasets([photos, watch], options, 1, ignore)
    with pytest.raises(DataError, match="3 images of an eval dataset"):
        scan_datasets([photos, dataset("same", dataset_type="eval")], options, 1, ignore)


def test_an_unreadable_folder_is_not_passed_over(
    dataset: MakeDataset, options: DataOptions, monkeypatch
) -> None:
    photos = dataset()
    write_sample(photos.instance_data_dir, "a.png", PNG)
    (photos.instance_data_dir / "locked").mkdir()
    real = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="locked: Permission denied"):
        scan_datasets([photos], options, 1, ignore)


def test_images_that_would_be_enlarged_too_much_are_rejected() -> None:
    """A 100x100 image in a 128 px bucket grows by 28 percent."""

    def assign(limit: float | None) -> object:
        framing = ResizeCropConfig(resolution=128, max_upscale_threshold=limit)
        return assign_bucket(framing, (100, 100), "a", 0, 64)

    assert assign(None) == assign(0.3)
    with pytest.raises(
        UnusableFile, match=r"enlarged by 28%, more than max_upscale_threshold 0\.2"
    ):
        assign(0.2)
