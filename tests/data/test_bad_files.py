"""Every row of the bad-input catalogue, through the scan and through the pixels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset import Dataset
from simpletuner.data.geometry import Framing
from simpletuner.data.pixels import load_pixels
from simpletuner.data.report import BadFile
from simpletuner.data.scan import scan
from simpletuner.errors import DataError
from simpletuner.events.types import Event, Noted
from tests.data.bad_files import PASSED_OVER, ROWS, Row, encoded, picture, write

GOOD = 3


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        ascii(str(path)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_row_is_kept_or_rejected_by_name(row: Row, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(GOOD):
        write(folder, f"good {number}.png", encoded(picture((64, 64 + number)), "PNG"))
    row.make(folder)
    before = fingerprint(folder)
    dataset = Dataset("d", "image", folder, Framing(resolution=64, minimum_image_size=32))
    options = DataOptions(max_bad_sample_fraction=1.0)
    events: list[Event] = []
    if row.reason == "caption_missing":
        with pytest.raises(DataError, match=r"1 pictures have no caption"):
            scan([dataset], options, 1, events.append, rejected_path=tmp_path / "rejected.jsonl")
    else:
        result = scan([dataset], options, 1, events.append, rejected_path=tmp_path / "rejected.jsonl")
        assert {item.reason for item in result.rejected} == ({row.reason} if row.reason else set())
        bad = [placed for placed in result.placed if "good" not in placed.sample.path.name]
        if row.decode:
            with pytest.raises(BadFile) as damage:
                load_pixels(bad[0], options)
            assert damage.value.reason == row.decode
        else:
            for placed in bad:
                assert load_pixels(placed, options).shape == (placed.bucket_px[1], placed.bucket_px[0], 3)
        assert len(result.placed) - len(bad) == GOOD
        assert bool(bad) == (not row.reason and row.name not in PASSED_OVER)
    listed = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text("ascii").splitlines()]
    assert {item["reason"] for item in listed} == ({row.reason} if row.reason else set())
    notes = [event.message for event in events if isinstance(event, Noted)]
    assert any(row.note in note for note in notes) if row.note else not notes
    assert fingerprint(folder) == before
