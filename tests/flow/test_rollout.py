"""Rollouts and MixFlow in closed form, and the addresses of their draws."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from simpletuner.config.schema import FlowOptions
from simpletuner.flow.objective import add_noise, velocity_target
from simpletuner.flow.rollout import (
    RolloutPlan,
    choose_rollouts,
    final_probability,
    mixflow_sigma,
    roll_out,
    rollout_probability,
)

KEYS = tuple(f"sample-{number}@0.0" for number in range(400))


def rollout_options(**more: object) -> FlowOptions:
    named = {f"scheduled_sampling_{name}": value for name, value in more.items()}
    return FlowOptions(**{"scheduled_sampling_probability": 1.0, **named})  # type: ignore[arg-type]


def pair(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, 16, 4, 6, generator=generator) for _ in range(2))  # type: ignore[return-value]


PLAN = RolloutPlan((0, 2), torch.tensor([0.55, 0.33]))
SIGMA = torch.tensor([0.5, 0.9, 0.3, 0.1])


def test_a_network_on_the_path_gives_the_plain_input_and_target() -> None:
    latents, noise = pair()

    def perfect(x: Tensor, sigma: Tensor, rows: Sequence[int]) -> Tensor:
        return velocity_target(latents, noise)[list(rows)]

    x_hat, target = roll_out(PLAN, latents, noise, SIGMA, perfect)
    rows = list(PLAN.rows)
    torch.testing.assert_close(x_hat, add_noise(latents, noise, SIGMA)[rows], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(target, velocity_target(latents, noise)[rows], atol=1e-5, rtol=1e-5)


def test_a_network_whose_rollout_is_known() -> None:
    """v(x, sigma) = a x + b: one Euler step is x_s + (sigma - s) (a x_s + b)."""
    latents, noise = pair()
    a, b = 0.7, -0.2
    seen: list[tuple[Tensor, tuple[int, ...]]] = []

    def affine(x: Tensor, sigma: Tensor, rows: Sequence[int]) -> Tensor:
        seen.append((sigma, tuple(rows)))
        assert not torch.is_grad_enabled()
        return a * x + b

    x_hat, target = roll_out(PLAN, latents, noise, SIGMA, affine)
    assert len(seen) == 1, "one forward pass for all chosen samples"
    assert torch.equal(seen[0][0], PLAN.start_sigma)
    assert seen[0][1] == (0, 2)
    for place, row in enumerate(PLAN.rows):
        s, sigma = float(PLAN.start_sigma[place]), float(SIGMA[row])
        x0, x1 = latents[row].double(), noise[row].double()
        start = (1 - s) * x0 + s * x1
        expected = start + (sigma - s) * (a * start + b)
        torch.testing.assert_close(x_hat[place].double(), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            target[place].double(), (expected - x0) / sigma, atol=5e-6, rtol=1e-5
        )


def test_the_target_leads_from_the_rollout_to_the_image() -> None:
    latents, noise = pair()
    x_hat, target = roll_out(PLAN, latents, noise, SIGMA, lambda x, sigma, rows: x.sin())
    rows = list(PLAN.rows)
    back = x_hat - SIGMA[rows].view(-1, 1, 1, 1) * target
    torch.testing.assert_close(back, latents[rows], atol=1e-6, rtol=0)
    plain = x_hat - SIGMA[rows].view(-1, 1, 1, 1) * velocity_target(latents, noise)[rows]
    assert float((plain - latents[rows]).abs().max()) > 1e-3, "the plain target would not"


def test_lengths_and_the_floor() -> None:
    sigma = torch.linspace(0.001, 1.0, len(KEYS))
    plan = choose_rollouts(rollout_options(max_step_offset=50), 1, 0, KEYS, sigma)
    chosen = sigma[list(plan.rows)]
    lengths = plan.start_sigma - chosen
    expected = [row for row in range(len(KEYS)) if 0.1 <= float(sigma[row]) < 1]
    assert list(plan.rows) == expected
    assert 0 < float(lengths.min()) < 0.001
    assert 0.049 < float(lengths.max()) <= 0.05 + 1e-6
    assert float(plan.start_sigma.max()) == 1.0, "near pure noise, a rollout begins there"
    inside = lengths[plan.start_sigma < 1]
    assert float(inside.mean()) == pytest.approx(0.025, abs=0.002)


@pytest.mark.parametrize(
    ("strategy", "mean"), [("uniform", 1 / 2), ("biased_early", 1 / 3), ("biased_late", 2 / 3)]
)
def test_strategies_have_their_mean_length(strategy: str, mean: float) -> None:
    sigma = torch.full((len(KEYS),), 0.5)
    plan = choose_rollouts(rollout_options(strategy=strategy), 1, 0, KEYS, sigma)
    assert len(plan.rows) == len(KEYS)
    assert float((plan.start_sigma - sigma).mean()) == pytest.approx(0.05 * mean, abs=0.003)


def test_draws_are_addressed_by_the_visit() -> None:
    options = rollout_options(probability=0.5)
    sigma = torch.full((len(KEYS),), 0.5)
    whole = choose_rollouts(options, 1, 7, KEYS, sigma)
    assert len(whole.rows) == pytest.approx(len(KEYS) / 2, abs=40)
    starts = dict(zip(whole.rows, whole.start_sigma.tolist(), strict=True))
    for row in range(20):
        alone = choose_rollouts(options, 1, 7, KEYS[row : row + 1], sigma[:1])
        assert alone.start_sigma.tolist() == ([starts[row]] if row in starts else [])
    assert choose_rollouts(options, 2, 7, KEYS, sigma).rows != whole.rows
    more = choose_rollouts(rollout_options(probability=0.8), 1, 7, KEYS, sigma)
    assert set(whole.rows) < set(more.rows), (
        "a higher probability keeps the rollouts of a lower one"
    )


def test_probability_by_step() -> None:
    def at(steps: Sequence[int], **more: object) -> list[float]:
        return [rollout_probability(rollout_options(**more), step) for step in steps]

    assert at([0, 99], probability=0.0, ramp_steps=10) == [0.0, 0.0]
    assert at([0, 99], probability=0.4) == [0.4, 0.4]
    assert at([9, 10], probability=0.4, start_step=10) == [0.0, 0.4]
    ramp = {"ramp_steps": 100, "start_step": 10, "prob_start": 0.2, "prob_end": 0.6}
    assert at([0, 10, 60, 110, 999], **ramp) == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
    cosine = at([10, 35, 60, 110], **ramp, ramp_shape="cosine")
    assert cosine == pytest.approx([0.2, 0.2 + 0.4 * 0.1464466, 0.4, 0.6])
    assert at([100], probability=0.8, ramp_steps=100) == pytest.approx([0.8])
    assert final_probability(rollout_options(**ramp)) == 0.6
    assert final_probability(rollout_options(probability=0.0, **ramp)) == 0.0


def test_mixflow_moves_the_input_towards_noise() -> None:
    sigma = torch.linspace(0, 1, len(KEYS))
    assert mixflow_sigma(FlowOptions(), 1, KEYS, sigma) is sigma
    options = FlowOptions(mixflow_enabled=True, mixflow_gamma=0.4)
    moved = mixflow_sigma(options, 1, KEYS, sigma)
    u = ((moved - sigma) / (0.4 * (1 - sigma)))[:-1]
    assert float(u.min()) >= 0
    assert float(u.max()) < 1 + 1e-4
    assert float(u.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(moved[-1]) == 1.0
    alone = mixflow_sigma(options, 1, KEYS[5:6], sigma[5:6])
    assert torch.equal(alone, moved[5:6])
