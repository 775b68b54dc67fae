"""What a run reports about the change of its weights."""

from __future__ import annotations

import pytest

from simpletuner.events.event_types import WeightChangeMeasured
from simpletuner.events.findings import (
    FAR_TOO_STRONG_ABOVE,
    LEARNT_NOTHING_BELOW,
    describe_weight_change,
)

NOTHING, STRONG = "has no visible effect: raise", "far too strong, and destroys"


@pytest.mark.parametrize(
    ("total", "step", "total_steps", "words"),
    [
        (0.9 * LEARNT_NOTHING_BELOW, 500, 500, NOTHING),
        (0.9 * LEARNT_NOTHING_BELOW, 500, 0, NOTHING),  # a log of an earlier version
        (0.9 * LEARNT_NOTHING_BELOW, 10, 500, ", too little to see so far"),
        (1.1 * LEARNT_NOTHING_BELOW, 500, 500, ""),
        (0.9 * FAR_TOO_STRONG_ABOVE, 500, 500, ""),
        (1.1 * FAR_TOO_STRONG_ABOVE, 10, 500, STRONG),
    ],
)
def test_a_change_at_the_extremes_is_named(
    total: float, step: int, total_steps: int, words: str
) -> None:
    event = WeightChangeMeasured(step, total, {"a": total, "b": 2 * total}, total_steps)
    sentence = describe_weight_change(event)
    start = f"step {step}: the trained weights changed by {total:.2%} of their norm (most in b: "
    assert sentence.startswith(start)
    rest = sentence[len(start) :].partition(")")[2]
    assert words in rest
    assert bool(rest) == bool(words)
    assert (NOTHING in rest, STRONG in rest) == (words == NOTHING, words == STRONG)
