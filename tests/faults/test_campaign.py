"""A corner of the campaign at every commit, and all of it with -m slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.errors import DataError
from tests.faults.__main__ import COUNTS, run_campaign
from tests.faults.outcomes import KINDS, Hang, Lost, Tally, WrongCode


@pytest.mark.parametrize("name", [*COUNTS, "kills", "disks"])
def test_a_corner_of_each_campaign(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (workspace := tmp_path / "workspace").mkdir()
    (tally,) = run_campaign(1, 0.01, (name,), tmp_path, workspace)
    assert tally.failures == 0, tally.examples
    assert tally.counts["clean"] >= 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (workspace := tmp_path / "workspace").mkdir()
    tallies = run_campaign(0, 1.0, (), tmp_path, workspace)
    assert {tally.name: tally.examples for tally in tallies if tally.failures} == {}


def test_each_kind_of_failure_is_counted() -> None:
    """The campaign would otherwise report what it cannot see."""
    tally = Tally("x")

    def fail(error: BaseException) -> None:
        raise error

    for error in (DataError("a message"), KeyError("x"), Hang(), WrongCode("1"), Lost("all")):
        tally.try_one("attempt", lambda error=error: fail(error))
    assert [tally.counts[kind] for kind in KINDS] == [1, 1, 1, 1, 1]
    assert tally.failures == 4
