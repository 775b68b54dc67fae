from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from simpletuner.config.schema import FlowOptions
from simpletuner.flow.objective import add_noise, loss_per_sample, velocity_target
from simpletuner.flow.solvers import sigma_grid, solve_euler


def pair(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, 16, 4, 6, generator=generator) for _ in range(2))  # type: ignore[return-value]


def test_the_path_goes_from_picture_to_noise_at_the_targets_speed() -> None:
    latents, noise = pair()
    assert torch.equal(add_noise(latents, noise, torch.zeros(3)), latents)
    assert torch.equal(add_noise(latents, noise, torch.ones(3)), noise)
    sigma = torch.tensor([0.1, 0.5, 0.9])
    ahead = add_noise(latents.double(), noise.double(), sigma.double() + 1e-6)
    speed = (ahead - add_noise(latents.double(), noise.double(), sigma.double())) / 1e-6
    torch.testing.assert_close(speed.float(), velocity_target(latents, noise), atol=1e-5, rtol=1e-5)


def test_l2_is_the_mean_square_of_each_sample_in_float32() -> None:
    prediction, target = pair()
    found = loss_per_sample(prediction.bfloat16(), target, torch.rand(3), FlowOptions())
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, (prediction.bfloat16().float() - target).square().mean((1, 2, 3))
    )


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber_losses_have_their_closed_form(kind: str, schedule: str) -> None:
    prediction, target = pair()
    sigma = torch.tensor([0.0, 0.4, 1.0])
    options = FlowOptions(loss_type=kind, huber_schedule=schedule, huber_c=0.1)
    found = loss_per_sample(prediction, target, sigma, options)
    for number, s in enumerate(sigma.tolist()):
        ratio = math.sqrt((1 - s) / (s + 1e-4))
        c = {"constant": 0.1, "exponential": 0.1**s, "snr": 0.9 / (1 + ratio) ** 2 + 0.1}[schedule]
        d = (prediction[number] - target[number]).double()
        soft = 2 * (torch.sqrt(d * d + c * c) - c).mean()
        assert float(found[number]) == pytest.approx(
            float(soft) * (c if kind == "huber" else 1), rel=1e-5
        )


def test_huber_is_square_for_small_and_straight_for_large_differences() -> None:
    options = FlowOptions(loss_type="huber", huber_schedule="constant", huber_c=0.1)
    zero, sigma = torch.zeros(1, 1, 1, 1), torch.zeros(1)
    small = loss_per_sample(zero + 1e-5, zero, sigma, options)
    assert float(small) == pytest.approx(
        1e-10, rel=1e-3
    )  # 2c (sqrt(d^2 + c^2) - c) -> d^2; no cancellation
    far = [float(loss_per_sample(zero + d, zero, sigma, options)) for d in (1000.0, 2000.0)]
    assert far[1] / far[0] == pytest.approx(2, rel=1e-3)


def test_the_grid_is_even_and_ends_in_the_picture() -> None:
    assert sigma_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_grid_and_the_steps_are_those_of_diffusers() -> None:
    steps = 7
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    x = pair()[0]
    mine = solve_euler(lambda at, sigma: at * sigma - 1, x, sigma_grid(steps))
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(x * sigma - 1, timestep, x, return_dict=False)[0]
    torch.testing.assert_close(mine, x, atol=1e-5, rtol=1e-5)


def test_euler_is_exact_on_a_straight_path_and_first_order_on_a_curved_one() -> None:
    latents, noise = pair()
    straight = solve_euler(lambda at, sigma: velocity_target(latents, noise), noise, sigma_grid(3))
    torch.testing.assert_close(straight, latents, atol=1e-5, rtol=1e-5)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = [
        abs(float(solve_euler(lambda at, sigma: at, one, sigma_grid(n))) - math.exp(-1))
        for n in (50, 100)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
