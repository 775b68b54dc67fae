"""Network inputs off the straight path, which sampling reaches and plain training never shows.

Plain training gives the network points on the path between an image and noise. Sampling gives it
its own predictions, which drift off the path: exposure bias. Two ways to train on such points:

A rollout (scheduled sampling) takes one sampling step of the network itself, from a higher noise
level sigma_s to the trained one, sigma. Its result x_hat is the input, and the target is the
velocity that leads from x_hat back to the image, (x_hat - x0) / sigma. Without drift this is the
plain target, noise - x0. The drift's share of the target grows as 1 / sigma, so there is no rollout
at low noise levels.

MixFlow (arXiv 2512.19311) adds noise to the input: it is at a higher noise level than the network
is given, and the target is the plain one. It costs nothing.

B batch · C latent channels · H W latent side (image px / 8)
sigma is the noise fraction: 0 is the image, 1 is pure noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner.config.schema import FlowOptions
from simpletuner.flow.objective import add_noise
from simpletuner.randomness import seed_at

# From noisy latents (n, C, H, W), their sigma (n,) and the rows of the batch that they belong to,
# to the velocity (n, C, H, W).
VelocityOfRows = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
# A rollout of length D ends at a sigma of at least FLOOR_IN_STEPS * (the longest D): there the
# drift of one step is at most half of the noise that is left.
FLOOR_IN_STEPS = 2

LENGTHS: dict[str, Callable[[float], float]] = {
    "uniform": lambda u: u,
    "biased_early": lambda u: u * u,
    "biased_late": lambda u: 1 - (1 - u) ** 2,
}
RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda fraction: fraction,
    "cosine": lambda fraction: (1 - math.cos(math.pi * fraction)) / 2,
}


@dataclass(frozen=True)
class RolloutPlan:
    """The samples of a batch whose input is a rollout.

    rows: their places in the batch. start_sigma: the noise level at which each begins, (n,) on the
    CPU, above the sigma that is trained.
    """

    rows: tuple[int, ...]
    start_sigma: Tensor


def rollout_probability(options: FlowOptions, step: int) -> float:
    """Return the probability that a sample of this step, counted from 0, is rolled out."""
    probability = options.scheduled_sampling_probability
    if not probability:
        return 0.0
    since = step - options.scheduled_sampling_start_step
    if not options.scheduled_sampling_ramp_steps:
        return probability if since >= 0 else 0.0
    start = options.scheduled_sampling_prob_start
    fraction = min(1.0, max(0.0, since / options.scheduled_sampling_ramp_steps))
    shape = RAMPS[options.scheduled_sampling_ramp_shape]
    return start + (final_probability(options) - start) * shape(fraction)


def final_probability(options: FlowOptions) -> float:
    """Return the highest probability of a rollout in the run, that after the ramp."""
    end = options.scheduled_sampling_prob_end
    if end is None or not options.scheduled_sampling_ramp_steps:
        return options.scheduled_sampling_probability
    return end if options.scheduled_sampling_probability else 0.0


def choose_rollouts(
    options: FlowOptions, seed: int, step: int, visit_keys: Sequence[str], sigma: Tensor
) -> RolloutPlan:
    """Return which samples are rolled out, and from where.

    sigma: (B,) on the CPU, the final noise levels, after any remap of the density. Each sample's
    draws are addressed by its visit key, so that they depend neither on the batch nor on the
    process. Samples below the floor, and those at pure noise, are never chosen.
    """
    probability = rollout_probability(options, step)
    longest = options.scheduled_sampling_max_step_offset / 1000
    rows: list[int] = []
    starts: list[float] = []
    for row, key in enumerate(visit_keys if probability else ()):
        generator = torch.Generator().manual_seed(seed_at(seed, "rollout", key))
        choice, u = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        level = float(sigma[row])
        if choice < probability and FLOOR_IN_STEPS * longest <= level < 1:
            rows.append(row)
            length = LENGTHS[options.scheduled_sampling_strategy](1 - u) * longest
            starts.append(min(1.0, level + length))
    return RolloutPlan(tuple(rows), torch.tensor(starts, dtype=torch.float32))


@torch.no_grad()
def roll_out(
    plan: RolloutPlan, latents: Tensor, noise: Tensor, sigma: Tensor, velocity: VelocityOfRows
) -> tuple[Tensor, Tensor]:
    """Return the inputs x_hat of the planned samples and their targets, each (n, C, H, W) float32.

    latents, noise: (B, C, H, W). sigma: (B,). velocity: called once, for all planned samples. The
    target is the velocity for which x_hat - sigma * target is the image.
    """
    rows = list(plan.rows)
    end_sigma = sigma[rows]
    start_sigma = plan.start_sigma.to(sigma.device)
    start = add_noise(latents[rows], noise[rows], start_sigma)
    length = (end_sigma - start_sigma).view(-1, 1, 1, 1)
    x_hat = start + length * velocity(start, start_sigma, plan.rows).float()
    return x_hat, (x_hat - latents[rows]) / end_sigma.view(-1, 1, 1, 1)


def mixflow_sigma(
    options: FlowOptions, seed: int, visit_keys: Sequence[str], sigma: Tensor
) -> Tensor:
    """Return the noise levels of the network's input, (B,): sigma without MixFlow.

    With it, sigma + u gamma (1 - sigma), u uniform in [0, 1) and addressed by the visit key.
    """
    if not options.mixflow_enabled:
        return sigma
    generators = [
        torch.Generator().manual_seed(seed_at(seed, "mixflow", key)) for key in visit_keys
    ]
    u = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    return sigma + u * options.mixflow_gamma * (1 - sigma)
