"""What the changes of the weights of made-up runs say about the limits of the findings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.nano import weight_change
from benchmarks.nano.experiment_inputs import base_fingerprint
from benchmarks.nano.weight_change import MeasuredRun, judge_lower, judge_upper

from simpletuner.events.event_log import EventLog
from simpletuner.events.event_types import Event, ScoresComputed, WeightChangeMeasured

BASE = MeasuredRun("untouched base", 0.0, (0.06, 0.04), (0.7, 0.08))


def runs(**changes: tuple[float, float, float]) -> list[MeasuredRun]:
    """name -> (change of the weights, zorbos, shapes)."""
    return [
        MeasuredRun(name, change, (zorbo, 0.08), (shapes, 0.08))
        for name, (change, zorbo, shapes) in changes.items()
    ]


USUAL = {"tiny": (4e-4, 0.06, 0.7), "good": (0.03, 0.8, 0.65), "broken": (0.9, 0.1, 0.1)}


def test_limits_between_the_runs_are_supported() -> None:
    measured = runs(**USUAL)
    lower, upper = judge_lower(measured, BASE, 1e-3), judge_upper(measured, BASE, 0.5)
    assert (lower.confirming, lower.wrong, lower.missed) == (1, 0, 0)
    assert (upper.confirming, upper.wrong, upper.missed) == (1, 0, 0)
    assert lower.words() == upper.words() == "supported by 1 run, contradicted by none"
    assert judge_upper(runs(a=(0.9, 0, 0), b=(0.7, 0.9, 0.6)), BASE, 0.5).words() == (
        "contradicted by 1 run"
    )


SUPPORTED = "supported by 1 run, contradicted by none"


@pytest.mark.parametrize(
    ("more", "lower", "upper"),
    [
        ((8e-4, 0.6, 0.7), "contradicted by 1 run; 0.0005 would have none", SUPPORTED),
        ((0.004, 0.1, 0.7), f"{SUPPORTED}; it misses 1, and 0.02 would find more", SUPPORTED),
        ((0.7, 0.9, 0.5), SUPPORTED, "contradicted by 1 run"),
        ((0.2, 0.0, 0.0), SUPPORTED, f"{SUPPORTED}; it misses 1, and 0.05 would find more"),
    ],
    ids=[
        "learnt with little",
        "learnt nothing with much",
        "intact with much",
        "destroyed with little",
    ],
)
def test_a_run_on_the_wrong_side_is_counted(
    more: tuple[float, float, float], lower: str, upper: str
) -> None:
    measured = runs(**USUAL, more=more)
    assert judge_lower(measured, BASE, 1e-3).words() == lower
    assert judge_upper(measured, BASE, 0.5).words() == upper


def test_without_runs_on_its_other_side_a_limit_is_not_judged() -> None:
    measured = runs(good=USUAL["good"])
    for limit in (judge_lower(measured, BASE, 1e-3), judge_upper(measured, BASE, 0.5)):
        assert limit.words() == "no run on its other side: neither supported nor contradicted"


def write_run(folder: Path, rate: float, *events: Event) -> None:
    folder.mkdir(parents=True)
    result = {
        "cell": folder.parent.name,
        "base": base_fingerprint(),
        "options": {"learning_rate": rate},
    }
    (folder / "result.json").write_text(json.dumps(result))
    log = EventLog(folder / "events.jsonl")
    for event in events:
        log.append(event)
    log.close()


def test_the_page_is_made_of_cells_and_of_sweeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path), "--results", str(tmp_path)]
    assert weight_change.main(words) == 1
    assert "no finished run" in capsys.readouterr().out
    scores = [
        ScoresComputed(250, "zorbo", "trained", 32, {"zorbo": (0.75, 0.08, 32), "all": (0.5, 0.08, 32)}),
        ScoresComputed(250, "shapes", "trained", 32, {"all": (0.6, 0.08, 32)}),
    ]  # fmt: skip
    change = WeightChangeMeasured(250, 0.031, {})
    write_run(tmp_path / "cells/lesson/seed-1", 3e-3, change, *scores)
    write_run(tmp_path / "cells/frozen/seed-1", 1e-12, change, *scores)
    write_run(tmp_path / "cells/unscored/seed-1", 3e-3, change)
    sweep = [
        {
            "rate": 1e-5,
            "weight_change": 4e-4,
            "scores": {"zorbo": [0.0, 0.0], "shapes": [0.7, 0.1]},
        },
        {"rate": 9e-2, "weight_change": None, "scores": {}},
    ]
    (tmp_path / "tuning.json").write_text(json.dumps([{"seed": 2, "runs": sweep}]))
    assert weight_change.main(words) == 0
    page = (tmp_path / "weight_change.md").read_text(encoding="utf-8")
    assert "2 runs on chroma-nano" in page
    assert "| lesson | 3.100% | 75 ± 8 | 60 ± 8 | learnt |" in page
    assert "| rate 1e-05, seed 2 | 0.040% | 0 ± 0 | 70 ± 10 | not learnt |" in page
    assert "below 0.1%: supported by 1 run, contradicted by none." in page
    assert "above 50%: no run on its other side" in page
