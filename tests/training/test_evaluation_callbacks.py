"""Which weights are drawn and scored at which step, whatever they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from simpletuner.training.evaluation_callbacks import (
    HeldOutLossCallback,
    ImageValidationCallback,
    ScoringCallback,
)
from simpletuner.validation.convergence import LossTrajectory

LAST = 6


class Net:
    """A trainee that says how strong its adapter is and whether it is averaged."""

    def __init__(self, lora: bool = True, ema: bool = False) -> None:
        self.transformer = self
        self.strength, self.averaged, self.lora = 1.0, False, lora
        self.averaged_weights = self._average if ema else None

    def set_lora_strength(self, strength: float) -> None:
        self.strength = strength if self.lora else 1.0

    @contextmanager
    def _average(self) -> Iterator[None]:
        self.averaged = True
        yield
        self.averaged = False


class Witness:
    """Stands for Validator and Scorer: writes down what it is given."""

    extra_strengths = (0.5, 0.25)

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, float, bool]] = []

    def generate_images(self, step: int, net: Net, weights: str) -> None:
        self.seen.append((step, weights, net.strength, net.averaged))

    score = generate_images


def drawn(net: Net, which: str, *steps: int) -> list[tuple[int, str, float, bool]]:
    witness = Witness()
    stage = ImageValidationCallback(cast(Any, witness), cast(Any, net), which, LAST)
    for step in steps:
        stage.generate_images(step)
    assert (net.strength, net.averaged) == (1.0, False)
    return witness.seen


def test_strengths_are_drawn_at_the_end_alone() -> None:
    assert drawn(Net(), "comparison", 0, 3, LAST) == [
        (0, "base", 0.0, False), (3, "trained", 1.0, False), (6, "trained", 1.0, False),
        (6, "strength 0.5", 0.5, False), (6, "strength 0.25", 0.25, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("which", "averaged"), [("comparison", False), ("none", False), ("ema_only", True)]
)
def test_strengths_are_of_the_weights_above_them(which: str, averaged: bool) -> None:
    """The sheet's row "after" shows the trained weights wherever they are drawn."""
    seen = drawn(Net(ema=True), which, LAST)
    assert (LAST, "strength 0.5", 0.5, averaged) in seen
    assert ((LAST, "trained", 1.0, False) in seen) == (not averaged)


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_scored_is_what_is_kept(ema: bool) -> None:
    for net in (Net(ema=ema), Net(lora=False, ema=ema)):
        witness = Witness()
        scoring = ScoringCallback(cast(Any, witness), cast(Any, net))
        for step in (0, 3):
            scoring.score(step)
        base = (0, "base", 0.0 if net.lora else 1.0, False)
        assert witness.seen == [base, (3, "ema" if ema else "trained", 1.0, ema)]
        assert (net.strength, net.averaged) == (1.0, False)


@pytest.mark.parametrize("ema", [False, True])
def test_held_out_loss_starts_from_the_lora_that_is_gone_on_from(ema: bool) -> None:
    net, seen = Net(ema=ema), []

    class HeldOut:
        last_step = None
        trajectory = LossTrajectory()

        def evaluate(self, net: Net, step: int, emit: object) -> None:
            seen.append((step, net.strength, net.averaged))

    measured = HeldOutLossCallback(cast(Any, HeldOut()), cast(Any, net), Path(), lambda event: None)
    for step in (0, 3):
        measured.evaluate(step)
    assert seen == [(0, 1.0, False), (3, 1.0, ema)]
