"""The bounds on CPU time: they grow on a slower CPU and hold on every other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from tests import quick
from tests.quick import assert_quick


@pytest.fixture
def two_seconds_each() -> Callable[[], float]:
    """A clock by which each try takes two seconds."""
    readings: Iterator[int] = itertools.count(0, 2)
    return lambda: next(readings)


@pytest.mark.parametrize("standard_s", [1e9, 1e-9], ids=["quick CPU", "slow CPU"])
def test_what_is_within_its_bound_passes_anywhere(
    standard_s: float, two_seconds_each: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "STANDARD_S", standard_s)
    assert_quick(list, 2.1, two_seconds_each)


def test_only_a_slower_cpu_makes_a_bound_longer(
    two_seconds_each: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "STANDARD_S", 1e9)
    with pytest.raises(AssertionError, match=r"not within 1\.9 s: 2 s on .*, 2 s on .*, 2 s on"):
        assert_quick(list, 1.9, two_seconds_each)
    monkeypatch.setattr(quick, "STANDARD_S", 1e-9)
    assert_quick(list, 1.9, two_seconds_each)
