"""Every row of the bad-input catalogue, through the scan and through the pixels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.data.pixels import load_pixels
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.scan import scan_datasets
from simpletuner.errors import DataError
from simpletuner.events.event_types import Event, NoticeIssued
from tests.data.unusable_files import (
    BAD_FILE_CASES,
    IGNORED_CASES,
    BadFileCase,
    encode_image,
    noise_image,
    write_sample,
)
from tests.unicode_names import needs_unicode_names

GOOD = 3


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        ascii(str(path)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


UNICODE_NAMES = ("name not utf-8", "nfc and nfd twins")
CASES = [
    pytest.param(row, id=row.name, marks=[needs_unicode_names] if row.name in UNICODE_NAMES else [])
    for row in BAD_FILE_CASES
]


@pytest.mark.parametrize("row", CASES)
def test_each_row_is_kept_or_rejected_by_name(row: BadFileCase, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(GOOD):
        write_sample(
            folder, f"good {number}.png", encode_image(noise_image((64, 64 + number)), "PNG")
        )
    row.make(folder)
    before = fingerprint(folder)
    dataset = DatasetConfig(
        "d", "image", folder, ResizeCropConfig(resolution=64, minimum_image_size=32)
    )
    options = DataOptions(max_bad_sample_fraction=1.0)
    events: list[Event] = []
    if row.reason == "caption_missing":
        with pytest.raises(DataError, match=r"1 image has no caption"):
            scan_datasets(
                [dataset], options, 1, events.append, rejected_path=tmp_path / "rejected.jsonl"
            )
    else:
        result = scan_datasets(
            [dataset], options, 1, events.append, rejected_path=tmp_path / "rejected.jsonl"
        )
        assert {item.reason for item in result.rejected} == ({row.reason} if row.reason else set())
        bad = [placed for placed in result.samples if "good" not in placed.sample.file.path.name]
        if row.decode:
            with pytest.raises(UnusableFile) as damage:
                load_pixels(bad[0], options)
            assert damage.value.reason == row.decode
        else:
            for placed in bad:
                assert load_pixels(placed, options).shape == (
                    placed.bucket_px[1],
                    placed.bucket_px[0],
                    3,
                )
        assert len(result.samples) - len(bad) == GOOD
        assert bool(bad) == (not row.reason and row.name not in IGNORED_CASES)
    listed = [
        json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text("ascii").splitlines()
    ]
    assert {item["reason"] for item in listed} == ({row.reason} if row.reason else set())
    notes = [event.message for event in events if isinstance(event, NoticeIssued)]
    assert any(row.note in note for note in notes) if row.note else not notes
    assert fingerprint(folder) == before
