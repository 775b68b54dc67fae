from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.events.charts import ChartLine, axis_ticks, downsample_points, render_line_chart
from simpletuner.events.event_log import EventLog, EventRecord
from simpletuner.events.event_types import (
    DatasetScanned,
    Event,
    ImageSaved,
    LossEvaluated,
    RunFailed,
    RunFinished,
    RunResumed,
    RunStarted,
    RunWorld,
    ScoresComputed,
    StepCompleted,
    WarningIssued,
    WeightsSaved,
)
from simpletuner.events.formatting import describe_event
from simpletuner.events.html_report import write_report
from simpletuner.events.run_history import history_from_records, read_run_history

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp; </style></title>"


def step(number: int, loss: float = 0.5) -> StepCompleted:
    return StepCompleted(number, 20, 0, loss, 1e-4, 1.0, 0.5, 1)


def image(
    folder: Path, number: int, weights: str, prompt: str = "a cat", name: str = "cat"
) -> ImageSaved:
    path = folder / "images" / f"{name}-{number}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (640, 480), (number, 0, 0)).save(path)
    return ImageSaved(number, name, prompt, f"images/{path.name}", 42, 640, 480, weights)


def evaluation(number: int, best: bool) -> LossEvaluated:
    return LossEvaluated(
        number,
        "d",
        "eval",
        0.5 - number / 100,
        -number / 100,
        0.003,
        ((0.1, 0.6), (0.9, 0.4)),
        best,
    )


def report(folder: Path, events: Iterable[Event], config: object = None, **more: object) -> str:
    log = EventLog(folder / "events.jsonl")
    for event in events:
        log.append(event)
    log.close()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return write_report(folder, **more).read_text("utf-8")  # type: ignore[arg-type]


class Tags(HTMLParser):
    VOID = ("meta", "img", "br", "link", "path", "line", "circle")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_asks_no_one(tmp_path: Path) -> None:
    events = [
        RunStarted("0.1", "r", "nano", "cpu", 20, 0), DatasetScanned("d", 3, ((64, 64, 3),), {"damaged": 1}),
        image(tmp_path, 0, "base"), evaluation(0, False), *(step(n) for n in range(1, 11)),
        image(tmp_path, 10, "trained"), evaluation(10, True), WeightsSaved(10, "checkpoint-10", 0.5, 1 << 20),
        WarningIssued("careful"), RunFinished(10, 5.0, "done"),
    ]  # fmt: skip
    (tmp_path / "checkpoint-10").mkdir()
    found = Tags(
        report(tmp_path, events, {"seed": 42, "rank": 8}, defaults={"seed": 42, "rank": 16})
    )
    assert found.open == []
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "iframe", "object", "link", "base", "form"}
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/webp;base64,")
        if tag == "a":
            assert re.fullmatch(r"images/cat-\d+\.png", str(attributes["href"]))
    policy = next(
        a for tag, a in found.tags if tag == "meta" and "content" in a and "http-equiv" in a
    )
    assert str(policy["content"]).startswith("default-src 'none'")
    assert "url(" not in found.texts[1]
    text = " ".join(found.texts)
    for word in (
        "before",
        "step 10",
        "best held-out",
        "careful",
    ):
        assert word in text
    assert sum(tag == "svg" for tag, _ in found.tags) == 6
    assert sum(tag == "img" for tag, _ in found.tags) == 2
    assert text.index("before") < text.index("step 10")
    changed = text.index("differ from the defaults")
    assert "rank" in text[changed:]
    assert "16" in text[changed:]


def test_the_header_names_the_processes_of_the_last_start(tmp_path: Path) -> None:
    one = RunStarted("0.1", "r", "nano", "cpu", 20, 0)
    (tmp_path / "one").mkdir()
    assert "process" not in report(tmp_path / "one", [one])
    two = dataclasses.replace(one, world=RunWorld(2, "sharded", 3 << 29))
    text = "2 processes, sharded by FSDP2, 1.5 GiB of base weights in each"
    (tmp_path / "two").mkdir()
    assert text in report(tmp_path / "two", [one, two])
    assert describe_event(two) == f"simpletuner 0.1: nano on cpu, {text}, steps 0 to 20"


def test_nothing_a_person_writes_becomes_markup(tmp_path: Path) -> None:
    events = [
        RunStarted(HOSTILE, HOSTILE, HOSTILE, HOSTILE, 20, 0),
        DatasetScanned(HOSTILE, 3, ((64, 64, 3),), {HOSTILE: 1}),
        image(tmp_path, 0, "base", HOSTILE), image(tmp_path, 5, "trained", HOSTILE),
        ImageSaved(6, HOSTILE, HOSTILE, 'images/"><script>.png', 1, 8, 8, HOSTILE),
        LossEvaluated(5, HOSTILE, HOSTILE, 0.5, 0.1, 0.1, ((0.1, 0.2), (0.9, 0.3)), True),
        step(1), WeightsSaved(5, HOSTILE, 1.0, 1), WarningIssued(HOSTILE + " \udcff"), RunFailed(5, HOSTILE, 4),  # noqa: E501
    ]  # fmt: skip
    folder = tmp_path
    found = Tags(report(folder, events, {HOSTILE: HOSTILE, "b": 1}, defaults={HOSTILE: "x"}))
    assert found.open == []
    assert "script" not in {tag for tag, _ in found.tags}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert sum(text.count("<script>alert(1)</script>") for text in found.texts) >= 10


def test_pictures_outside_the_run_folder_are_not_embedded(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    outside = ImageSaved(1, "p", "p", "../private.png", 1, 8, 8, "trained")
    gone = ImageSaved(2, "p", "p", "images/gone.png", 1, 8, 8, "trained")
    found = Tags(report(folder, [outside, gone]))
    assert not any(tag == "img" for tag, _ in found.tags)
    assert {"outside the run folder", "missing"} <= set(found.texts)


def test_the_abandoned_end_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    events = [
        RunStarted("0.1", "r", "nano", "cpu", 20, 0), *(step(n, 0.5) for n in range(1, 9)),
        evaluation(8, True), image(tmp_path, 8, "trained"),
        RunStarted("0.1", "r", "nano", "cpu", 20, 5), RunResumed(5, "checkpoint-5"),
        *(step(n, 0.25) for n in range(6, 8)),
    ]  # fmt: skip
    report(tmp_path, events)
    history = read_run_history(tmp_path)
    assert [event.loss for event in history.steps.values()] == [0.5] * 5 + [0.25] * 2
    assert history.evaluations == {}
    assert history.images == {}
    assert history.resume_steps == [5]
    assert history.end_event is None


def test_an_empty_run_has_a_page_too(tmp_path: Path) -> None:
    assert "no run recorded yet" in write_report(tmp_path).read_text()


def test_many_steps_keep_first_and_last_column(tmp_path: Path) -> None:
    events = [
        image(tmp_path, number, "base" if number == 0 else "trained")
        for number in range(0, 300, 10)
    ]
    found = Tags(report(tmp_path, events))
    heads = [text for text in found.texts if text == "before" or re.fullmatch(r"step \d+", text)]
    assert len(heads) == 9
    assert (heads[0], heads[-1]) == ("before", "step 290")
    assert "9 of 30 steps" in found.texts


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3e-9, 7e-9), (123456, 123457), (0.1, 0.9), (-5, 1e6)]
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = axis_ticks(low, high, 5)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_thinning_keeps_spikes_and_order() -> None:
    points = [(float(n), math.sin(n / 50)) for n in range(20000)]
    points[777] = (777.0, 99.0)
    points[12345] = (12345.0, -99.0)
    kept = downsample_points(points, 500)
    assert len(kept) <= 502
    assert {points[777], points[12345]} <= set(kept)
    assert kept == sorted(kept)


def test_charts_have_gaps_where_numbers_are_not_finite() -> None:
    points = [(1.0, 0.5), (2.0, math.nan), (3.0, math.inf), (4.0, 0.25), (5.0, 0.3)]
    svg = render_line_chart("t", [ChartLine(points)])
    assert svg.count("M") == 2
    assert "nan" not in svg
    assert "inf" not in svg
    assert render_line_chart("t", [ChartLine([(1.0, math.nan)])]) == ""
    assert "<svg" in render_line_chart("t", [ChartLine([(1.0, 0.5)], markers=True, errors=[0.0])])


def test_a_fresh_start_has_nothing_before_it() -> None:
    start = RunStarted("0.1", "r", "nano", "cpu", 20, 0)
    records = [
        EventRecord(1.0, event, 0)
        for event in (start, evaluation(0, False), step(1), start, step(1))
    ]
    found = history_from_records(records)
    assert sorted(found.steps) == [1]
    assert not found.evaluations


def scored(number: int, colour: float) -> ScoresComputed:
    rates = {"colour": (colour, 0.04, 80), "pair": (0.0, 0.0, 9)}
    return ScoresComputed(number, "shapes", "trained" if number else "base", 64, rates)


def test_scores_stand_side_by_side(tmp_path: Path) -> None:
    abandoned = [scored(15, 0.11), RunResumed(10, "checkpoint-10")]
    page = report(tmp_path, [scored(0, 0.25), scored(10, 0.5), *abandoned, scored(20, 0.75)])
    table = page[page.index("<h2>Scores") : page.index("</table>", page.index("<h2>Scores"))]
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", table)
    assert heads == ["shapes, 64 prompts", "before", "step 10", "step 20"]
    cells = re.findall(r"<td>([^<]*)</td>", table)
    assert cells == ["colour", "25 ± 4 %", "50 ± 4 %", "75 ± 4 %", "pair", *["0 ± 0 %"] * 3]
    assert "<h2>Scores" not in report(tmp_path / "none", [step(1)])


def test_a_strength_is_a_column_of_its_prompt_and_not_a_row(tmp_path: Path) -> None:
    events = [
        image(tmp_path, 0, "base"),
        image(tmp_path, 10, "trained"),
        image(tmp_path, 10, "strength 0.5"),
    ]
    page = report(tmp_path, events)
    images = page.partition("Validation images")[2].partition("</table>")[0]
    assert images.count('<th scope="row">') == 1
    assert '<th scope="col">strength 0.5</th>' in images
    assert images.count("<img ") == 3


def test_settings_stack_on_a_phone(tmp_path: Path) -> None:
    """An option's name is never broken in its middle: name and values are below each other."""
    (tmp_path / "config.json").write_text(json.dumps({"a_rather_long_option_name": 1}))
    page = report(tmp_path, [image(tmp_path, 0, "base")])
    assert '<table class="plain settings">' in page
    assert "grid-column: 1 / -1" in page
