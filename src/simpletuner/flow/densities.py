"""Which noise levels are trained, each density as its inverse distribution function: uniform u to sigma.

Given as quantiles, any of them can be stratified: one draw from each of n equal slices of probability.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simpletuner.config.schema import FlowOptions
from simpletuner.flow.shift import resolve_shift, shift_sigma
from simpletuner.randomness import seed_at

QuantileFunction = Callable[[Tensor], Tensor]
FAST_SCHEDULE_SIGMAS = (1.0,) * 7 + (0.75, 0.5, 0.25)
BETA_TABLE_POINTS = 8192


def sample_sigmas(
    options: FlowOptions, seed: int, step: int, count: int, image_tokens: int | None = None
) -> Tensor:
    """(count,) float32: the noise levels of all samples of one optimizer step, a function of (seed, step).

    Stratified, each of `count` equal slices of probability gives one, in random order: the density is the
    same and the loss of a step varies less. image_tokens: patches of one sample, for the automatic shift.
    """
    values = custom_sigmas(options)
    if values and options.flow_timesteps_mode == "round-robin":
        return torch.tensor(
            [values[(step * count + index) % len(values)] for index in range(count)]
        )
    generator = torch.Generator().manual_seed(seed_at(seed, "sigma", step))
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    if options.stratified_sigmas:
        u = (torch.randperm(count, generator=generator) + u) / count
    return quantile_function(options, image_tokens)(u).float()


def quantile_function(options: FlowOptions, image_tokens: int | None = None) -> QuantileFunction:
    """The density that the options describe: u in (0, 1) to sigma in [0, 1], float64, never decreasing
    (the literal remap jumps over one half). A shift is applied before any remap.
    """
    values = custom_sigmas(options) or (FAST_SCHEDULE_SIGMAS if options.flux_fast_schedule else ())
    if values:
        return discrete_quantile(values)
    shift = resolve_shift(options, image_tokens)
    base, remap = DENSITIES[density_name(options)]
    draw = base(options)
    return lambda u: remap(shift_sigma(draw(u.double().clamp(1e-12, 1 - 1e-12)), shift))


def density_name(options: FlowOptions) -> str:
    if options.flow_use_uniform_schedule:
        return "uniform"
    return "beta" if options.flow_use_beta_schedule else options.chroma_sigma_density


def custom_sigmas(options: FlowOptions) -> tuple[float, ...]:
    """flow_custom_timesteps as sigmas; empty when not given. A value above 1 makes them timesteps to 1000."""
    if not options.flow_custom_timesteps:
        return ()
    values = [float(word) for word in options.flow_custom_timesteps.split(",")]
    return tuple(value / 1000 if max(values) > 1 else value for value in values)


def discrete_quantile(values: tuple[float, ...]) -> QuantileFunction:
    """Each value equally often; repeat one to draw it more."""
    table = torch.tensor(sorted(values), dtype=torch.float64)
    return lambda u: table[(u.double() * len(table)).long().clamp(0, len(table) - 1)]


def logit_normal(options: FlowOptions) -> QuantileFunction:
    """sigmoid(scale * N(0, 1)), eq. 19 of Esser et al. 2024 with location 0."""
    return lambda u: torch.sigmoid(options.flow_sigmoid_scale * torch.special.ndtri(u))


def parabola(options: FlowOptions) -> QuantileFunction:
    """p(x) proportional to 2 - 7.7 (x - 1/2)^2 on 1,000 points i / 999: how Chroma itself was trained."""
    grid = torch.arange(1000, dtype=torch.float64) / 999
    weights = 2 - 7.7 * (grid - 0.5) ** 2
    edges = weights.cumsum(0) / weights.sum()
    return lambda u: grid[torch.searchsorted(edges, u).clamp(max=999)]


def beta(options: FlowOptions) -> QuantileFunction:
    """Beta(a, b) by a table of its distribution over z = logit(x), where the density x^a (1 - x)^b is
    smooth and bounded for every a, b > 0.
    """
    a, b = options.flow_beta_schedule_alpha, options.flow_beta_schedule_beta
    z = torch.linspace(-40 / min(a, 1.0), 40 / min(b, 1.0), BETA_TABLE_POINTS, dtype=torch.float64)
    log_density = a * torch.nn.functional.logsigmoid(z) + b * torch.nn.functional.logsigmoid(-z)
    density = (log_density - log_density.max()).exp()
    total = torch.cat((z.new_zeros(1), torch.cumulative_trapezoid(density, z)))
    total /= total[-1].clone()

    def value(u: Tensor) -> Tensor:
        right = torch.searchsorted(total, u).clamp(1, BETA_TABLE_POINTS - 1)
        low, high = total[right - 1], total[right]
        part = ((u - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
        return torch.sigmoid(z[right - 1] + part * (z[right] - z[right - 1]))

    return value


def identity(sigma: Tensor) -> Tensor:
    return sigma


def raise_tails(sigma: Tensor) -> Tensor:
    """2 s^2 below one half, 1 - 2 (1 - s)^2 above: continuous, both tails visited more often."""
    return torch.where(sigma < 0.5, 2 * sigma**2, 1 - 2 * (1 - sigma) ** 2)


def raise_tails_literally(sigma: Tensor) -> Tensor:
    """s^2 below one half, 1 - (1 - s)^2 above: jumps from 1/4 to 3/4, nothing between is ever trained."""
    return torch.where(sigma < 0.5, sigma**2, 1 - (1 - sigma) ** 2)


DENSITIES: dict[str, tuple[Callable[[FlowOptions], QuantileFunction], QuantileFunction]] = {
    "quadratic": (logit_normal, raise_tails),
    "parabola": (parabola, identity),
    "quadratic-literal": (logit_normal, raise_tails_literally),
    "uniform": (lambda options: identity, identity),
    "logit-normal": (logit_normal, identity),
    "beta": (beta, identity),
}
