"""What early stopping says about a learning rate that had not come down."""

from __future__ import annotations

from typing import Any

import pytest

from simpletuner.config.schema import OptimizerOptions
from simpletuner.events.event_types import Event, NoticeIssued
from simpletuner.training.early_stopping import EarlyStopping, describe_high_rate
from simpletuner.validation.held_out_loss import HeldOutEvaluator
from tests.validation.toy_family import INFERENCE


def notices_of_an_end(step: int, total_steps: int, **options: Any) -> list[str]:
    """The loss never improves, and one such measurement ends the run at `step`."""
    events: list[Event] = []
    evaluator = HeldOutEvaluator(INFERENCE, (), 1, 0)
    stopping = EarlyStopping(
        evaluator, 1, total_steps, lambda step: None, lambda step: False,
        OptimizerOptions(learning_rate=1e-4, lr_warmup_steps=0, **options), events.append,
    )  # fmt: skip
    for at in (0, step):
        evaluator.trajectory.add(at, {"a": 1.0, "b": 2.0})
    stopping.check(step)
    assert stopping.ends_after(step)
    return [event.message for event in events if isinstance(event, NoticeIssued)]


def test_a_schedule_that_had_not_come_down_is_named() -> None:
    """Half of a cosine or of a line is half of the rate; a quadratic curve is at a quarter."""
    for options, share in (
        ({"lr_scheduler": "cosine"}, "50%"),
        ({"lr_scheduler": "linear"}, "50%"),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, "25%"),
        ({"lr_scheduler": "linear", "lr_end": 5e-5}, "75%"),
    ):
        ended, rate = notices_of_an_end(40, 80, **options)
        assert "the run ends at step 40 of 80" in ended
        assert f"lr_scheduler {options['lr_scheduler']} had not brought" in rate
        assert f"it was still at {share} of learning_rate" in rate
        assert "max_train_steps 40 " in rate


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"lr_scheduler": "constant"}, 40),
        ({"lr_scheduler": "linear"}, 75),
        ({"lr_scheduler": "cosine"}, 70),
        ({"lr_scheduler": "linear", "lr_end": 1e-4}, 40),
    ],
)
def test_a_rate_that_is_low_or_constant_needs_no_remark(options: Any, step: int) -> None:
    (ended,) = notices_of_an_end(step, 80, **options)
    assert f"the run ends at step {step} of 80" in ended


def test_no_remark_in_the_warm_up_of_a_constant_rate() -> None:
    options = OptimizerOptions(learning_rate=1e-4, lr_scheduler="constant", lr_warmup_steps=50)
    assert describe_high_rate(options, 20, 100) is None
