"""The arithmetic of the paired benchmarks, under clocks that only the work advances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks.paired import Timing, compare, cpu_model, summarize, time_call

from benchmarks import paired


class FakeMachine:
    """CPU and wall clocks, and work that takes a stated time on them."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 100.0
        self.calls: list[str] = []

    @property
    def clocks(self) -> tuple[Callable[[], float], Callable[[], float]]:
        return (lambda: self.cpu_s), (lambda: self.wall_s)

    def work(self, name: str, cpu_s: list[float], wall_s: float = 0.0) -> Callable[[], None]:
        """Return work that takes the next of `cpu_s` at each call."""
        waiting = iter(cpu_s)

        def run() -> None:
            self.calls.append(name)
            taken = next(waiting)
            self.cpu_s += taken
            self.wall_s += taken + wall_s

        return run


def test_one_call() -> None:
    machine = FakeMachine()
    assert time_call(machine.work("a", [2.0], 0.5), machine.clocks) == Timing(2.0, 2.5)


def test_the_ways_alternate_and_the_warmup_is_dropped() -> None:
    machine = FakeMachine()
    ours, theirs = machine.work("ours", [50.0, 1.0, 2.0]), machine.work("theirs", [9.0, 4.0, 4.0])
    before = machine.work("before", [7.0] * 6)
    found = compare(ours, theirs, 2, warmup=1, before=before, clocks=machine.clocks)
    assert machine.calls == ["before", "ours", "before", "theirs"] * 3
    assert [run.cpu_s for run in found.ours] == [1.0, 2.0]
    assert [run.cpu_s for run in found.theirs] == [4.0, 4.0]


def test_a_load_that_meets_both_of_a_pair_does_not_change_the_ratio() -> None:
    machine, slowdown = FakeMachine(), [1.0, 8.0, 3.0, 1.0, 20.0]
    ours = machine.work("ours", [0.5 * factor for factor in slowdown])
    theirs = machine.work("theirs", [1.0 * factor for factor in slowdown])
    found = compare(ours, theirs, 5, warmup=0, clocks=machine.clocks).cpu()
    assert (found["ratio_q1"], found["ratio"], found["ratio_q3"]) == (0.5, 0.5, 0.5)
    assert (found["ours_s"], found["theirs_s"], found["pairs"]) == (1.5, 3.0, 5)


def test_the_median_and_the_quartiles_are_of_the_ratios() -> None:
    ours, theirs = [1.0, 4.0, 3.0, 8.0, 50.0], [10.0, 20.0, 10.0, 20.0, 100.0]
    found = summarize(ours, theirs)  # ratios: 0.1, 0.2, 0.3, 0.4, 0.5
    assert (found["ratio_q1"], found["ratio"], found["ratio_q3"]) == (0.2, 0.3, 0.4)
    assert found["ratio"] != found["ours_s"] / found["theirs_s"]


def test_cpu_and_wall_time_are_told_apart() -> None:
    machine = FakeMachine()
    ours, theirs = machine.work("ours", [1.0] * 3, 1.0), machine.work("theirs", [1.0] * 3, 3.0)
    found = compare(ours, theirs, 3, warmup=0, clocks=machine.clocks)
    assert (found.cpu()["ratio"], found.wall()["ratio"]) == (1.0, 0.5)
    assert found.both() == {"cpu": found.cpu(), "wall": found.wall()}


def test_too_few_pairs_and_too_short_work_are_errors() -> None:
    with pytest.raises(ValueError, match="1 pairs have no quartiles"):
        compare(lambda: None, lambda: None, 1)
    with pytest.raises(ValueError, match="too short"):
        summarize([1.0, 1.0], [1.0, 0.0])


def test_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = paired.environment()
    assert found["torch_threads"] == torch.get_num_threads()
    assert not {"cpu", "wall"} & set(found), "the summaries have these names"
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nmodel name\t: Fast 9000: 2 GHz\nmodel name\t: Other\n")
    assert cpu_model(listed) == "Fast 9000: 2 GHz"
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    listed.write_text("processor\t: 0\n")
    assert cpu_model(listed) == cpu_model(tmp_path / "absent") == "arm64"
