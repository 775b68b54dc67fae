"""Verdicts on synthetic curves of held-out losses, with noise, and the images that resist."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from simpletuner.events.event_types import SampleLossesMeasured, VerdictReached
from simpletuner.events.findings import describe_sample_losses, describe_verdict
from simpletuner.validation.convergence import LossTrajectory, find_resisting

SAMPLES = 32
NOISE = 0.01  # of one sample at one measurement; the standard error of a mean is 0.0018
SEEDS = range(40)


def trajectory(curve: Callable[[int], float], count: int, seed: int) -> LossTrajectory:
    """Measurements every 100 steps: easy and hard samples, the curve, and noise."""
    random = np.random.default_rng(seed)
    ease = random.uniform(0.2, 2.0, SAMPLES)
    made = LossTrajectory()
    for number in range(count):
        noise = random.normal(0.0, NOISE, SAMPLES)
        losses = ease + curve(100 * number) + noise
        made.add(100 * number, {f"{at}.png": float(loss) for at, loss in enumerate(losses)})
    return made


def falling(step: int) -> float:
    return 0.1 * math.exp(-step / 1500)


def settled(step: int) -> float:
    return 0.1 * math.exp(-step / 120)


def overfit(step: int) -> float:
    return 0.1 * math.exp(-step / 200) + 0.00008 * max(0, step - 500)


def shares(curve: Callable[[int], float], count: int) -> dict[str, float]:
    found = [trajectory(curve, count, seed).judge().verdict for seed in SEEDS]
    return {name: found.count(name) / len(found) for name in dict.fromkeys(found)}


def test_a_run_that_was_cut_short_is_still_learning() -> None:
    assert shares(falling, 6).get("learning", 0) >= 0.9


def test_a_run_that_settled_is_flat() -> None:
    found = shares(settled, 12)
    assert found.get("flat", 0) >= 0.6
    assert found.get("overfitting", 0) <= 0.1


def test_a_run_made_to_overfit_is_found_out() -> None:
    assert shares(overfit, 14).get("overfitting", 0) >= 0.95
    since = [trajectory(overfit, 14, seed).judge().since_step for seed in SEEDS]
    assert 300 <= np.median(since) <= 800


def test_noise_alone_is_rarely_called_anything_but_flat() -> None:
    found = shares(lambda step: 0.0, 12)
    assert found.get("overfitting", 0) <= 0.15


def test_few_measurements_say_nothing() -> None:
    event = trajectory(falling, 2, 0).judge()
    assert event.verdict == "unknown"
    assert "eval_steps_interval" in describe_verdict(event)


def test_many_small_improvements_are_an_improvement() -> None:
    made = LossTrajectory()
    for number in range(8):
        losses = {f"{at}.png": 1.0 + at - 0.4 * 0.001 * number for at in range(4)}
        losses["0.png"] += 0.001 * (number % 2)
        made.add(number, losses)
    assert made.reference_step > 0
    assert made.stale_measurements < 3


def test_other_samples_start_again() -> None:
    made = LossTrajectory()
    made.add(0, {"a": 1.0})
    made.add(1, {"a": 0.5})
    made.add(2, {"b": 2.0})
    assert (made.steps, made.reference_step) == ([2], 2)


def test_a_resumed_trajectory_decides_the_same() -> None:
    made = trajectory(overfit, 9, 3)
    copy = LossTrajectory()
    copy.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert (copy.steps, copy.losses) == (made.steps, made.losses)
    assert copy.stale_measurements == made.stale_measurements
    assert copy.judge() == made.judge()


@pytest.mark.parametrize(
    ("curve", "count", "words"),
    [
        (falling, 6, "still learning at step 500"),
        (overfit, 14, "overfitting since step"),
        (lambda step: 0.0, 12, "not learning"),
        (settled, 30, "since step"),
    ],
)
def test_verdicts_in_words(curve: Callable[[int], float], count: int, words: str) -> None:
    found = [describe_verdict(trajectory(curve, count, seed).judge()) for seed in SEEDS]
    assert sum(words in text for text in found) >= len(found) // 2


def test_a_loss_that_rose_does_not_ask_for_a_higher_rate() -> None:
    for change, advice in ((0.013, "Lower learning_rate"), (0.011, "raise learning_rate")):
        verdict = VerdictReached(2, "flat", 0, 0, 8, change, 0.006)
        assert "not learning" in describe_verdict(verdict)
        assert advice in describe_verdict(verdict)


def test_a_wrong_caption_stands_out() -> None:
    random = np.random.default_rng(1)
    losses = {
        f"{at}.png": (1.0 + at, (1.0 + at) * (0.8 + random.normal(0, 0.02))) for at in range(20)
    }
    losses["wrong.png"] = (5.0, 5.1)
    assert find_resisting(losses)[0] == "wrong.png"
    event = SampleLossesMeasured(9, "d", "train", losses, ("wrong.png",))
    assert "1 of 21 training image resists" in describe_sample_losses(event)
    assert "wrong.png (5.0000 to 5.1000)" in describe_sample_losses(event)


def test_nothing_resists_where_nothing_was_learnt_or_compared() -> None:
    flat = {f"{at}.png": (1.0, 1.0 + 0.001 * at) for at in range(20)}
    assert find_resisting({**flat, "odd.png": (1.0, 3.0)}) == []
    assert find_resisting({"a": (1.0, 0.5), "b": (1.0, 2.0)}) == []
