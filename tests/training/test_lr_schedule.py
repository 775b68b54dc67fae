from __future__ import annotations

import math

import pytest

from simpletuner.config.schema import OptimizerOptions
from simpletuner.training.optimizers import LR_SCHEDULERS, effective_learning_rate, learning_rate


def rates(total: int = 100, **options) -> list[float]:
    chosen = OptimizerOptions(**{"learning_rate": 2.0, **options})
    return [learning_rate(chosen, step, total) for step in range(total)]


def test_closed_forms():
    assert rates(lr_scheduler="constant") == [2.0] * 100
    assert rates(lr_scheduler="linear", lr_end=1.0) == pytest.approx(
        [2 - t / 100 for t in range(100)]
    )
    assert rates(lr_scheduler="cosine") == pytest.approx(
        [1 + math.cos(math.pi * t / 100) for t in range(100)]
    )
    quadratic = [2 * (1 - t / 100) ** 2 for t in range(100)]
    assert rates(lr_scheduler="polynomial", lr_power=2.0) == pytest.approx(quadratic)


@pytest.mark.parametrize("shape", LR_SCHEDULERS)
def test_warm_up_then_the_whole_rest(shape):
    with_warmup = rates(lr_scheduler=shape, lr_warmup_steps=20, lr_end=0.25)
    assert with_warmup[:20] == pytest.approx([2 * (t + 1) / 20 for t in range(20)])
    assert with_warmup[20:] == pytest.approx(rates(80, lr_scheduler=shape, lr_end=0.25))
    assert with_warmup[20] == 2.0
    assert min(with_warmup) > 0
    assert with_warmup[20:] == sorted(with_warmup[20:], reverse=True)
    assert min(with_warmup[20:]) >= 0.25


@pytest.mark.parametrize("shape", LR_SCHEDULERS)
def test_ends_at_lr_end_one_step_after_the_last_and_stays(shape):
    options = OptimizerOptions(learning_rate=2.0, lr_end=0.5, lr_scheduler=shape)
    for step in (100, 101, 500):
        assert learning_rate(options, step, 100) == pytest.approx(
            2.0 if shape == "constant" else 0.5
        )


def test_warm_up_longer_than_the_run():
    assert rates(10, lr_warmup_steps=20, lr_scheduler="cosine") == pytest.approx(
        [(t + 1) / 10 for t in range(10)]
    )


def test_scale_by_batch():
    assert effective_learning_rate(OptimizerOptions(learning_rate=0.1), 9) == 0.1
    assert effective_learning_rate(
        OptimizerOptions(learning_rate=0.1, lr_scale=True), 9
    ) == pytest.approx(0.9)
    root = OptimizerOptions(learning_rate=0.1, lr_scale_sqrt=True)
    assert effective_learning_rate(root, 9) == pytest.approx(0.3)


def test_table_covers_the_option():
    assert set(LR_SCHEDULERS) == set(
        OptimizerOptions.model_fields["lr_scheduler"].annotation.__args__
    )
