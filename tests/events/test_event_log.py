from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import pytest

from simpletuner.events import event_types
from simpletuner.events.event_log import (
    EventLog,
    count_damaged_lines,
    event_from_dict,
    event_to_dict,
    read_events,
)
from simpletuner.events.event_types import Event

EXAMPLES = [
    event_types.RunStarted("0.1", "/r", "nano", "cpu", 10, 0),
    event_types.NoticeIssued("é 🐈\nsecond line \udcff"),
    event_types.WarningIssued("w"),
    event_types.StageStarted("scan", None, "files"),
    event_types.StageProgress("scan", 3, None, 1.5, None),
    event_types.StageCompleted("scan", 3, 1.0, "note"),
    event_types.DatasetScanned("d", 3, ((512, 512, 2), (448, 576, 1)), {"damaged": 1}),
    event_types.StepCompleted(1, 10, 0, 0.5, 1e-4, 0.1, 0.2, 1, 16.5),
    event_types.StepCompleted(2, 10, 0, 0.5, 1e-4, 0.1, 0.2, 1),
    event_types.WeightsSaved(2, "checkpoint-2", 0.1, 12345),
    event_types.RunResumed(2, "checkpoint-2"),
    event_types.CheckpointSetAside("checkpoint-4", "cut off"),
    event_types.ImageSaved(2, "cat", "a <cat>", "images/cat.png", 1, 64, 128, "trained"),
    event_types.PromptsChosen(2, (("cat", "a <cat>", "", None), ("dog", "a dog", "cats", 7)), True),
    event_types.ContactSheetSaved(2, "images/sheet.png"),
    event_types.LossEvaluated(2, "d", "eval", 0.4, -0.1, 0.01, ((0.1, 0.5), (0.9, 0.25)), True),
    event_types.VerdictReached(2, "flat", 1, 1, 8, -0.1, 0.01),
    event_types.KnowledgeCompared(9, "shapes", 0.77, 0.05, 0.5, 0.06),
    event_types.KnowledgeCompared(9, "retention", 0.3, 0.05, 0.2, 0.06, "similarity", 0.01),
    event_types.WeightChangeMeasured(2, 0.01, {"single_transformer_blocks.0": 0.02}),
    event_types.RateTried(1e-4, 20, 0.5, 0.01, 0.002),
    event_types.RateChosen(1e-4, 0.5, 8, 2e-4, 0.01, 0.002, 1.25, False),
    event_types.SampleLossesMeasured(2, "d", "train", {"d/a.png": (0.5, 0.25)}, ("d/a.png",)),
    event_types.CaptionFitMeasured("d", {"d/a.png": 0.5, "d/b.png": -0.1}, ("d/b.png",)),
    event_types.ScoresComputed(
        2, "shapes", "ema", 64, {"colour": (0.5, 0.06, 80), "pair": (0.0, 0.0, 9)}
    ),
    event_types.RunFinished(10, 2.5, "done"),
    event_types.RunFailed(3, "boom", 4),
    event_types.RunStarted(
        "0.1", "/r", "n", "cpu", 9, 0, event_types.RunWorld(2, "zero3", 1 << 33)
    ),
]


def test_every_kind_of_event_has_an_example() -> None:
    assert {type(event) for event in EXAMPLES} == set(event_types.EVENT_CLASSES.values())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run" / "events.jsonl")
    for event in EXAMPLES:
        log.append(event)
    log.close()
    path = tmp_path / "run" / "events.jsonl"
    records = list(read_events(path))
    assert [record.event for record in records] == EXAMPLES
    assert path.read_bytes().count(b"\n") == len(EXAMPLES)
    assert records[-1].end_offset == path.stat().st_size
    for record in records:  # any place is a place to go on from
        assert (
            len(list(read_events(path, record.end_offset)))
            == len(EXAMPLES) - records.index(record) - 1
        )


@pytest.mark.parametrize(
    "world", [None, {}, {"processes": "2"}, [1], {"processes": 2, "mode": "x"}]
)
def test_unknown_processes_leave_the_start_of_the_run_readable(world: object) -> None:
    start = event_to_dict(EXAMPLES[0], 1.0)
    del start["world"]  # written before the field existed
    assert event_from_dict(start) == EXAMPLES[0]
    assert event_from_dict({**start, "world": world}) == EXAMPLES[0]


def test_numbers_that_are_not_finite_survive_as_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "e"
    log = EventLog(path)
    log.append(dataclasses.replace(EXAMPLES[7], loss=math.nan, grad_norm=math.inf))
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None
    event = next(read_events(path)).event
    assert isinstance(event, event_types.StepCompleted)
    assert math.isnan(event.loss)
    assert event.memory_gib == 16.5


def test_torn_foreign_and_unknown_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "e"
    EventLog(path).append(event_types.NoticeIssued("one"))
    other = b'{"t": 1, "kind": "from_the_future"}\nnot json\n[1]\n{"t": 1, "kind": "noted"}\n\xff\n'
    newer = b'{"t": 1, "kind": "noted", "message": "two", "more": 3}\n'
    with path.open("ab") as file:
        file.write(other + newer + b'{"t": 1, "kind": "no')
    assert [record.event for record in read_events(path)] == [
        event_types.NoticeIssued("one"),
        event_types.NoticeIssued("two"),
    ]
    EventLog(path).append(
        event_types.NoticeIssued("three")
    )  # after a process that was killed in the middle of a line
    assert [record.event for record in read_events(path)][-1] == event_types.NoticeIssued("three")
    assert list(read_events(tmp_path / "none")) == []


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e")
    threads = [
        threading.Thread(
            target=lambda n=n: [
                log.append(event_types.NoticeIssued(str(n) * 3000)) for _ in range(20)
            ]
        )
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(read_events(tmp_path / "e"))) == 120


def test_a_failed_write_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk writes a part of a line, then nothing; later there is room again."""
    path = tmp_path / "e"
    log = EventLog(path)
    log.append(EXAMPLES[0])
    real, calls = os.write, iter((5, None, None))

    def fail(handle: int, data: bytes) -> int:
        part = next(calls)
        if part is None:
            raise OSError(28, "No space left on device")
        return real(handle, data[:part])

    monkeypatch.setattr(os, "write", fail)
    for event in EXAMPLES[1:3]:
        with pytest.raises(OSError, match="No space"):
            log.append(event)
    monkeypatch.setattr(os, "write", real)
    log.append(EXAMPLES[3])
    log.close()
    assert [record.event for record in read_events(path)] == EXAMPLES[:4]


def write_log(path: Path, events: Sequence[Event]) -> Path:
    log = EventLog(path)
    for event in events:
        log.append(event)
    log.close()
    return path


def flip_bit(path: Path, at: int) -> None:
    """Change one bit in place: a file that is written anew goes to the disk each time."""
    with path.open("r+b") as file:
        file.seek(at // 8)
        changed = file.read(1)[0] ^ 1 << at % 8
        file.seek(at // 8)
        file.write(bytes([changed]))


def test_every_flipped_bit_of_a_log_is_skipped_or_read_with_the_right_types(tmp_path: Path) -> None:
    hints = {kind: get_type_hints(kind) for kind in event_types.EVENT_CLASSES.values()}
    for number, example in enumerate(EXAMPLES):
        path = write_log(tmp_path / str(number), [example] * 3)
        sound = path.read_bytes()
        length = len(sound) // 3
        for at in range(8 * length, 16 * length, 3):  # in the line between two others
            flip_bit(path, at)
            events = [record.event for record in read_events(path)]
            assert events  # a flipped line end costs two lines
            for event in events:
                for name, wanted in hints[type(event)].items():
                    if wanted in (int, str, bool, dict) and name != "kind":
                        assert type(getattr(event, name)) is wanted
            flip_bit(path, at)
        assert path.read_bytes() == sound
    path = write_log(tmp_path / "all", EXAMPLES)
    assert count_damaged_lines(path) == 0
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b'"message"', b'"mossage"', 1))
    assert count_damaged_lines(path) == 1


@pytest.mark.parametrize(
    "line",
    [
        '{"t": 1, "kind": "noted", "message": 5}',
        '{"t": 1, "kind": "saved", "step": "2", "path": "a", "seconds": 1, "bytes": 1}',
        '{"t": 1, "kind": "dataset_scanned", "dataset": "d", "samples": 1, "buckets": [[1]], "rejected": {}}',
        '{"t": 1, "kind": "dataset_scanned", "dataset": "d", "samples": 1, "buckets": [], "rejected": []}',
        "[" * 100_000,
        "1",
        '{"t": 1, "kind": []}',
        '{"t": [], "kind": "noted", "message": "x"}',
    ],
)
def test_a_line_of_other_types_is_no_event(tmp_path: Path, line: str) -> None:
    (tmp_path / "e").write_text(line + "\n")
    assert list(read_events(tmp_path / "e")) == []
