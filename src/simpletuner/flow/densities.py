"""The densities of the noise levels (sigmas) that are trained.

Each density is given by its quantile function, which maps a uniform u to sigma. In this form every
density can be stratified: one u from each of n equal slices of probability. A schedule shift, which
moves the noise levels of large images up, belongs to the density; it is off for Chroma by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from simpletuner.config.schema import FlowOptions
from simpletuner.randomness import seed_at

QuantileFunction = Callable[[Tensor], Tensor]
FAST_SCHEDULE_SIGMAS = (1.0,) * 7 + (0.75, 0.5, 0.25)
BETA_TABLE_POINTS = 8192
# Steps over which the noise levels are spread evenly where a step has only one sample.
STEPS_PER_BLOCK = 16


def sample_sigmas(
    options: FlowOptions,
    seed: int,
    step: int,
    count: int,
    image_tokens: int | None = None,
    offsets: Sequence[float] = (),
) -> Tensor:
    """Return the noise levels of all samples of one optimizer step, (count,) float32.

    They are a pure function of (seed, step). With stratified_sigmas each of `count` equal slices of
    probability gives one sigma, in random order: the density is the same, and the loss of a step
    varies less. For a single sample, each of 16 slices gives the sigma of one of 16 steps.
    image_tokens: 2x2 patches of one sample; the automatic shift needs them. offsets: one per sample
    (timestep_sampling_offset), or empty; lists of noise levels do not have them.
    """
    values = custom_sigmas(options)
    if values and options.flow_timesteps_mode == "round-robin":
        return torch.tensor(
            [values[(step * count + index) % len(values)] for index in range(count)]
        )
    generator = torch.Generator().manual_seed(seed_at(seed, "sigma", step))
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    if options.stratified_sigmas and count == 1:
        # By the block and not by what was drawn before, so that a resumed run finds its slice.
        block, position = divmod(step, STEPS_PER_BLOCK)
        block_generator = torch.Generator().manual_seed(seed_at(seed, "sigma block", block))
        slices = torch.randperm(STEPS_PER_BLOCK, generator=block_generator)
        u = (slices[position] + u) / STEPS_PER_BLOCK
    elif options.stratified_sigmas:
        u = (torch.randperm(count, generator=generator) + u) / count
    return quantile_function(options, image_tokens, offsets)(u).float()


def quantile_function(
    options: FlowOptions, image_tokens: int | None = None, offsets: Sequence[float] = ()
) -> QuantileFunction:
    """Return the density that the options describe: a map of u in (0, 1) to sigma in [0, 1].

    It is float64 and never decreasing. A shift is applied before the remap of the density. offsets:
    one per u, added to logit(sigma) before the remap, which is a shift of exp(offset).
    """
    values = custom_sigmas(options) or (FAST_SCHEDULE_SIGMAS if options.flux_fast_schedule else ())
    if values:
        return discrete_quantile(values)
    shift: float | Tensor = resolve_shift(options, image_tokens)
    if any(offsets):
        shift = shift * torch.tensor(offsets, dtype=torch.float64).exp()
    base, remap = DENSITIES[density_name(options)]
    quantile = base(options)
    # rand() may return 0, where the quantiles of a normal distribution are infinite.
    return lambda u: remap(shift_sigma(quantile(u.double().clamp(1e-12, 1 - 1e-12)), shift))


def shift_sigma(sigma: Tensor, shift: float | Tensor) -> Tensor:
    """Return s x / (1 + (s - 1) x), eq. 23 of Esser et al. 2024; a shift of 1 changes nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def auto_shift(image_tokens: int) -> float:
    """Return exp(mu), with mu linear in the number of 2x2 patches, as Flux's schedule has it.

    mu is 0.5 at 256 patches and 1.15 at 4096.
    """
    return math.exp(0.5 + (image_tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def resolve_shift(options: FlowOptions, image_tokens: int | None) -> float:
    """Return the shift that the options ask for; 1.0 changes nothing. The automatic shift wins."""
    if not options.flow_schedule_auto_shift:
        return options.flow_schedule_shift or 1.0
    if image_tokens is None:
        raise ValueError("flow_schedule_auto_shift needs the number of image tokens")
    return auto_shift(image_tokens)


def density_name(options: FlowOptions) -> str:
    """Return the key of DENSITIES; two older options are aliases of chroma_sigma_density."""
    if options.flow_use_uniform_schedule:
        return "uniform"
    return "beta" if options.flow_use_beta_schedule else options.chroma_sigma_density


def custom_sigmas(options: FlowOptions) -> tuple[float, ...]:
    """Return flow_custom_timesteps as sigmas, or an empty tuple when the option is not set.

    Where any value is above 1, all of them are timesteps up to 1000.
    """
    if not options.flow_custom_timesteps:
        return ()
    values = [float(word) for word in options.flow_custom_timesteps.split(",")]
    return tuple(value / 1000 if max(values) > 1 else value for value in values)


def discrete_quantile(values: tuple[float, ...]) -> QuantileFunction:
    """Give each value the same probability; a value that is listed twice has twice as much."""
    table = torch.tensor(sorted(values), dtype=torch.float64)
    return lambda u: table[(u.double() * len(table)).long().clamp(0, len(table) - 1)]


def logit_normal(options: FlowOptions) -> QuantileFunction:
    """Return the quantiles of sigmoid(scale * N(0, 1)), eq. 19 of Esser et al. 2024, location 0."""
    return lambda u: torch.sigmoid(options.flow_sigmoid_scale * torch.special.ndtri(u))


def parabola(options: FlowOptions) -> QuantileFunction:
    """Return p(x) proportional to 2 - 7.7 (x - 1/2)^2 on the 1,000 points i / 999.

    Chroma itself was trained with this density.
    """
    grid = torch.arange(1000, dtype=torch.float64) / 999
    weights = 2 - 7.7 * (grid - 0.5) ** 2
    # The last edge may be rounded to less than 1; a u above it belongs to the last point.
    edges = weights.cumsum(0) / weights.sum()
    return lambda u: grid[torch.searchsorted(edges, u).clamp(max=999)]


def beta(options: FlowOptions) -> QuantileFunction:
    """Return the quantiles of Beta(a, b) from a table over z = logit(x).

    Over z the density is x^a (1 - x)^b, which is smooth and bounded for every a, b > 0.
    """
    a, b = options.flow_beta_schedule_alpha, options.flow_beta_schedule_beta
    # The density falls like exp(a z) on the left and exp(-b z) on the right: exp(-40) at the ends.
    z = torch.linspace(-40 / min(a, 1.0), 40 / min(b, 1.0), BETA_TABLE_POINTS, dtype=torch.float64)
    log_density = a * torch.nn.functional.logsigmoid(z) + b * torch.nn.functional.logsigmoid(-z)
    density = (log_density - log_density.max()).exp()
    distribution = torch.cat((z.new_zeros(1), torch.cumulative_trapezoid(density, z)))
    distribution /= distribution[-1].clone()

    def value(u: Tensor) -> Tensor:
        right = torch.searchsorted(distribution, u).clamp(1, BETA_TABLE_POINTS - 1)
        low, high = distribution[right - 1], distribution[right]
        fraction = ((u - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
        return torch.sigmoid(z[right - 1] + fraction * (z[right] - z[right - 1]))

    return value


def identity(sigma: Tensor) -> Tensor:
    """Return sigma unchanged: a density without a remap."""
    return sigma


def raise_tails(sigma: Tensor) -> Tensor:
    """Return 2 s^2 below one half and 1 - 2 (1 - s)^2 above: continuous, with heavier tails."""
    return torch.where(sigma < 0.5, 2 * sigma**2, 1 - 2 * (1 - sigma) ** 2)


def raise_tails_literally(sigma: Tensor) -> Tensor:
    """Return s^2 below one half and 1 - (1 - s)^2 above.

    The result jumps from 1/4 to 3/4, so no sigma between the two is ever trained.
    """
    return torch.where(sigma < 0.5, sigma**2, 1 - (1 - sigma) ** 2)


DENSITIES: dict[str, tuple[Callable[[FlowOptions], QuantileFunction], QuantileFunction]] = {
    "quadratic": (logit_normal, raise_tails),
    "parabola": (parabola, identity),
    "quadratic-literal": (logit_normal, raise_tails_literally),
    "uniform": (lambda options: identity, identity),
    "logit-normal": (logit_normal, identity),
    "beta": (beta, identity),
}
