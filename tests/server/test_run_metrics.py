"""Columns: every step once, thin enough to draw, nothing of the loss's extremes lost."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from simpletuner.events import event_types
from simpletuner.server import file_reader
from simpletuner.server.run_metrics import downsample
from simpletuner.server.run_reader import RunReader
from tests.server.run_folder_writer import START_T, RunFolderWriter

LOSSES = some.lists(some.none() | some.floats(-1e6, 1e6), min_size=1, max_size=300)


@given(LOSSES, some.integers(4, 60))
def test_thinning_keeps_the_ends_and_the_extremes(losses: list[float | None], most: int) -> None:
    steps = list(downsample(losses, most))
    kept = [losses[step] for step in steps]
    assert len(kept) <= most
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, len(losses) - 1)
    numbers = [loss for loss in losses if loss is not None]
    if len(losses) <= most:
        assert kept == losses
    elif len(numbers) == len(losses):
        assert {min(numbers), max(numbers)} <= set(kept)
    elif numbers:
        assert min(numbers) in kept
        assert None in kept, "a step without a loss is no less to be seen"


def test_columns(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 3)
    run.write_events(event_types.StepCompleted(4, 100, 0, math.nan, 1e-4, math.inf, 1.5, 4, 7.25))
    run.write_events(event_types.LossEvaluated(4, "photos", "eval", 0.25, 0.0, 0.0, (), True))
    run.write_events(event_types.LossEvaluated(4, "photos", "train", math.nan, 0.0, 0.0, (), True))
    run.write_events(
        event_types.ScoresComputed(
            4, "chroma-nano", "trained", 8, {"shape": (0.5, 0.1, 8), "colour": (1.0, 0.0, 8)}
        )
    )
    run.write_events(
        event_types.ScoresComputed(4, "clip", "trained", 8, {"mean": (0.25, 0.1, 8)}, "similarity")
    )
    found = RunReader(run.path).metrics(100)
    assert found.step == [1, 2, 3, 4]
    assert found.t == [START_T + 6, START_T + 8, START_T + 10, START_T + 12]
    assert found.loss == [1.0, 0.5, pytest.approx(1 / 3), None]
    assert (found.grad_norm[-1], found.memory_gib) == (None, [None, None, None, 7.25])
    assert found.held_out == [(4, "eval", 0.25)]
    assert found.scores == [
        (4, "chroma-nano", "shape", 0.5, "share"),
        (4, "chroma-nano", "colour", 1.0, "share"),
        (4, "clip", "mean", 0.25, "similarity"),
    ]
    assert found.end == run.events.stat().st_size
    found.model_dump_json()


def test_the_end_is_where_the_live_connection_goes_on(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 10)
    end = RunReader(run.path).metrics(100).end
    run.write_steps(11, 12)
    with run.events.open("ab") as file:
        file.write(b'{"t": 1, "kind": "st')
    more = file_reader.read_lines(run.events, end)
    assert ([file_reader.parse_record(line)["step"] for line in more.lines], more.start) == (
        [11, 12],
        end,
    )  # type: ignore[index]
    assert RunReader(run.path).metrics(100).end == more.end, "not behind half a line"


def test_a_resumed_run_did_its_steps_once(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 10, loss=lambda step: 9.0)
    run.write_events(event_types.LossEvaluated(10, "photos", "eval", 9.0, 0.0, 0.0, (), True))
    run.write_start(resumed=5).write_steps(6, 8, loss=lambda step: 1.0)
    found = RunReader(run.path).metrics(100)
    assert found.step == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found.loss == [9.0] * 5 + [1.0] * 3
    assert (found.held_out, found.resumes) == ([], [5])
    run.write_start().write_steps(1, 1)
    assert RunReader(run.path).metrics(100).step == [1]


def test_another_file_begins_anew(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 10)
    end = RunReader(run.path).metrics(100).end
    run.events.unlink()
    assert RunReader(run.path).metrics(100).end == 0
    run.write_start().write_steps(1, 2)
    for since in (end, 10, 10**30, -5):
        found = file_reader.read_lines(run.events, since)
        assert (found.start, found.end) == (0, run.events.stat().st_size), since


def test_a_file_of_several_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = (
        RunFolderWriter(tmp_path / "run")
        .write_start(1000)
        .write_steps(1, 600, 1000)
        .write_start(1000, resumed=400)
    )
    run.write_steps(401, 900, 1000)
    whole = RunReader(run.path).metrics(1000)
    monkeypatch.setattr(file_reader, "MAX_READ_BYTES", 10_000)
    assert RunReader(run.path).metrics(1000) == whole
    assert whole.step == list(range(1, 901))


def test_a_file_that_is_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 100)
    monkeypatch.setattr(file_reader, "MAX_READ_BYTES", 2_000)
    real = file_reader.read_lines
    offsets: list[int] = []

    def replace_after_second(
        path: Path, since: int, limit: int | None = None
    ) -> file_reader.LineChunk:
        offsets.append(since)
        if len(offsets) == 3:
            run.events.unlink()
            run.write_steps(1, 2, loss=lambda step: 7.0)
        return real(path, since, limit)

    monkeypatch.setattr(file_reader, "read_lines", replace_after_second)
    metrics = RunReader(run.path).metrics(1000)
    assert (metrics.step, metrics.loss) == ([1, 2], [7.0, 7.0])
    assert metrics.end == run.events.stat().st_size


TEXTS = some.text(some.characters(codec="utf-8"), max_size=40)


@given(TEXTS, some.integers(16, 40), some.integers(-60, 60))
def test_a_log_is_cut_between_characters(
    tmp_path_factory: pytest.TempPathFactory, text: str, limit: int, since: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "train.log"
    data = text.encode()
    path.write_bytes(data)
    part = file_reader.read_log_part(path, since, limit)
    assert part.size == len(data)
    assert data[part.start : part.end].decode() == part.text
    assert part.end - part.start <= limit
    wanted = max(0, len(data) + since) if since < 0 else since if since <= len(data) else 0
    assert wanted <= part.start <= wanted + 3
    read, at = "", 0
    while (part := file_reader.read_log_part(path, at, limit)).end > at:
        assert part.start == at
        read, at = read + part.text, part.end
    assert read == text


def test_half_a_character_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_bytes("añ".encode()[:2])
    first = file_reader.read_log_part(path, 0, 100)
    assert (first.text, first.end, first.size) == ("a", 1, 2)
    path.write_bytes("añ".encode())
    assert file_reader.read_log_part(path, 1, 100).text == "ñ"
    path.write_bytes(b"a\xff\xfeb")
    assert file_reader.read_log_part(path, 0, 100).text == "a\ufffd\ufffdb"


def test_a_long_run_takes_little_memory(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start(20_000).write_steps(1, 20_000, 20_000)
    tracemalloc.start()
    RunReader(run.path).metrics(2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * 900, "bytes a step"
