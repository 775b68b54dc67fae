from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path

import pytest

from simpletuner.events import types
from simpletuner.events.log import EventLog, read

EXAMPLES = [
    types.RunStarted("0.1", "/r", "nano", "cpu", 10, 0),
    types.Noted("é 🐈\nsecond line \udcff"),
    types.Warned("w"),
    types.StageStarted("scan", None, "files"),
    types.StageProgress("scan", 3, None, 1.5, None),
    types.StageDone("scan", 3, 1.0, "note"),
    types.DatasetScanned("d", 3, ((512, 512, 2), (448, 576, 1)), {"damaged": 1}),
    types.Stepped(1, 10, 0, 0.5, 1e-4, 0.1, 0.2, 1, 16.5),
    types.Stepped(2, 10, 0, 0.5, 1e-4, 0.1, 0.2, 1),
    types.Saved(2, "checkpoint-2", 0.1, 12345),
    types.Resumed(2, "checkpoint-2"),
    types.CheckpointSetAside("checkpoint-4", "cut off"),
    types.ImageSaved(2, "cat", "a <cat>", "images/cat.png", 1, 64, 128, "trained"),
    types.SheetSaved(2, "images/sheet.png"),
    types.Evaluated(2, "d", "eval", 0.4, -0.1, 0.01, ((0.1, 0.5), (0.9, 0.25)), True),
    types.Scored(2, "shapes", "ema", 64, {"colour": (0.5, 0.06, 80), "pair": (0.0, 0.0, 9)}),
    types.Finished(10, 2.5, "done"),
    types.Failed(3, "boom", 4),
]


def test_every_kind_of_event_has_an_example() -> None:
    assert {type(event) for event in EXAMPLES} == set(types.EVENTS.values())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run" / "events.jsonl")
    for event in EXAMPLES:
        log.append(event)
    log.close()
    path = tmp_path / "run" / "events.jsonl"
    records = list(read(path))
    assert [record.event for record in records] == EXAMPLES
    assert path.read_bytes().count(b"\n") == len(EXAMPLES)
    assert records[-1].end == path.stat().st_size
    for record in records:  # any place is a place to go on from
        assert len(list(read(path, record.end))) == len(EXAMPLES) - records.index(record) - 1


def test_numbers_that_are_not_finite_survive_as_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "e"
    log = EventLog(path)
    log.append(dataclasses.replace(EXAMPLES[7], loss=math.nan, grad_norm=math.inf))
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None
    event = next(read(path)).event
    assert isinstance(event, types.Stepped)
    assert math.isnan(event.loss)
    assert event.memory_gib == 16.5


def test_torn_foreign_and_unknown_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "e"
    EventLog(path).append(types.Noted("one"))
    other = b'{"t": 1, "kind": "from_the_future"}\nnot json\n[1]\n{"t": 1, "kind": "noted"}\n\xff\n'
    newer = b'{"t": 1, "kind": "noted", "message": "two", "more": 3}\n'
    with path.open("ab") as file:
        file.write(other + newer + b'{"t": 1, "kind": "no')
    assert [record.event for record in read(path)] == [types.Noted("one"), types.Noted("two")]
    EventLog(path).append(types.Noted("three"))  # after a process that was killed in the middle of a line
    assert [record.event for record in read(path)][-1] == types.Noted("three")
    assert list(read(tmp_path / "none")) == []


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e")
    threads = [
        threading.Thread(target=lambda n=n: [log.append(types.Noted(str(n) * 3000)) for _ in range(20)])
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(read(tmp_path / "e"))) == 120
