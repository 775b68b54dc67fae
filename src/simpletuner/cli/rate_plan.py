"""The plan of a search for the learning rate: which rates, how many steps, and what it costs.

Every trial starts from the same weights and sees the same samples and noise in the same order; only
the rate differs. All rates are trained to the first rung; two are trained on to the second. Where
nothing is held out, each rate is trained once for each fold, and measured on the images left out.

Costs are counted in forward passes of one sample: a training step takes about three for each.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simpletuner.config.schema import RunConfig
from simpletuner.errors import ConfigError

FORWARDS_PER_SAMPLE = 3
MAX_COST = 1.5  # of one run
# Steps of the second rung to those of the first. The longer the second rung, the less it favours
# high rates; the smaller ratio is for runs whose first rung would be too short.
RUNG_RATIOS = (8, 3)
FINALISTS = 2
FOLDS = 2
MAX_IMAGES = 64
MIN_FIRST_RUNG = 5
MAX_MEASURING_SHARE = 1 / 3
CLEARLY_WORSE_ERRORS = 2.0
GRID_FACTORS = (0.1, 0.316, 1.0, 3.16, 10.0)  # around the rate of the configuration
MAX_RATE = 10.0


@dataclass(frozen=True)
class RunSize:
    """The length of the run that the rate is for. images: to train on. batch: of a step."""

    steps: int
    batch: int
    images: int
    has_held_out: bool

    @property
    def forwards(self) -> int:
        return FORWARDS_PER_SAMPLE * self.steps * self.batch


@dataclass(frozen=True)
class SearchPlan:
    """A search. rates: ascending. rungs: steps. folds: 1 with held-out images.

    images, sigmas: of each measurement.
    """

    rates: tuple[float, ...]
    rungs: tuple[int, int]
    folds: int
    images: int
    sigmas: int
    size: RunSize

    @property
    def cost(self) -> float:
        """The most that the search can cost, in runs: with one more rate beyond the grid."""
        trials = len(self.rates) + 1
        steps = trials * self.rungs[0] + FINALISTS * (self.rungs[1] - self.rungs[0])
        measured = (trials + FINALISTS) * self.images * self.sigmas
        forwards = self.folds * (steps * self.size.batch * FORWARDS_PER_SAMPLE + measured)
        return forwards / self.size.forwards

    def describe(self) -> str:
        """Return the sentences that are shown before it starts."""
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        on = f"{self.images} images at {self.sigmas} noise levels"
        where = "held-out " if self.folds == 1 else f"left-out (in {self.folds} folds) "
        return (
            f"learning rates {rates}: all to step {self.rungs[0]}, two of them to step "
            f"{self.rungs[1]}; measured on {where}{on}. This costs at most {self.cost:.2f} times a "
            f"run of {self.size.steps} steps"
        )


def default_rates(rate: float) -> tuple[float, ...]:
    """Return five rates from a tenth to ten times `rate`, with two digits."""
    return tuple(float(f"{factor * rate:.2g}") for factor in GRID_FACTORS)


def parse_rates(text: str) -> tuple[float, ...]:
    """Return the rates of "5e-5,1e-4", ascending. Raises ConfigError."""
    try:
        rates = sorted({float(word) for word in text.split(",")})
    except ValueError:
        rates = []
    if len(rates) < 2 or not all(0 < rate <= MAX_RATE for rate in rates):
        raise ConfigError(
            f"--rates: {text!r} is not a list of at least two rates above 0 and at most "
            f"{MAX_RATE:g}; write for example 5e-5,1e-4,2e-4"
        )
    return tuple(rates)


def plan_search(
    rates: Sequence[float], size: RunSize, sigmas: int, wanted_steps: int | None = None
) -> SearchPlan:
    """Return the longest search within MAX_COST, or the one with the wanted steps.

    Raises ConfigError where the run is too short for these rates, or the wanted steps cost more.
    """
    folds = 1 if size.has_held_out else FOLDS
    images = max(1, min(MAX_IMAGES, size.images // (1 if size.has_held_out else folds)))

    def plan(first: int, last: int) -> SearchPlan:
        return SearchPlan(tuple(rates), (first, last), folds, images, sigmas, size)

    while measuring_share(plan(0, 0)) > MAX_MEASURING_SHARE and sigmas * images > 8:
        sigmas, images = (sigmas // 2, images) if sigmas > 4 else (sigmas, images // 2)
    if wanted_steps is not None:
        long, short = (wanted_steps // ratio for ratio in RUNG_RATIOS)
        chosen = plan(long if long >= MIN_FIRST_RUNG else max(1, short), wanted_steps)
        if chosen.cost > MAX_COST:
            raise ConfigError(
                f"--steps {wanted_steps} costs {chosen.cost:.2f} times a run of {size.steps} "
                f"steps, more than {MAX_COST}; use fewer steps or fewer --rates"
            )
        return chosen
    for ratio in RUNG_RATIOS:
        first = 0
        while plan(first + 1, ratio * (first + 1)).cost <= MAX_COST and ratio * first < size.steps:
            first += 1
        if first >= MIN_FIRST_RUNG:
            return plan(first, ratio * first)
    raise ConfigError(
        f"a run of {size.steps} steps is too short to try {len(rates)} learning rates within "
        f"{MAX_COST} times its cost; raise max_train_steps, or name fewer --rates"
    )


def measuring_share(plan: SearchPlan) -> float:
    """Return which part of MAX_COST the measurements alone take. plan: with rungs (0, 0)."""
    return plan.cost / MAX_COST


def run_size(run: RunConfig, image_count: int, has_held_out: bool) -> RunSize:
    """Return the size of the run that the configuration describes."""
    training = run.training
    wanted = run.distributed.num_processes
    processes = wanted if isinstance(wanted, int) else 1
    batch = training.train_batch_size * training.gradient_accumulation_steps * processes
    epochs = training.num_train_epochs or 1
    steps = training.max_train_steps or math.ceil(epochs * image_count / batch)
    return RunSize(steps, batch, image_count, has_held_out)


@dataclass(frozen=True)
class TrialResult:
    """Losses of a rate after `steps`, by sample; None for a rate that diverged."""

    rate: float
    steps: int
    losses: Mapping[str, float] | None

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses.values()) if self.losses else math.inf


def compare(one: TrialResult, other: TrialResult) -> tuple[float, float]:
    """Return loss of one - loss of other, paired over the images, and its standard error."""
    if not one.losses or not other.losses:
        return one.loss - other.loss if one.losses or other.losses else 0.0, 0.0
    differences = [one.losses[name] - other.losses[name] for name in one.losses]
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else 0.0
    return statistics.fmean(differences), error


def beyond_the_grid(results: Sequence[TrialResult]) -> float | None:
    """Return one more rate to try where the best is the lowest or the highest; else None."""
    ordered = sorted(results, key=lambda result: result.rate)
    best = min(ordered, key=lambda result: result.loss)
    if best is ordered[0]:
        return float(f"{best.rate * best.rate / ordered[1].rate:.2g}")
    if best is ordered[-1]:
        return min(MAX_RATE, float(f"{best.rate * best.rate / ordered[-2].rate:.2g}"))
    return None


def choose_finalists(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the best rate and the next lower one, however much worse that is so far.

    Short runs favour high rates, so the lower neighbour is the one that could still win. Where
    there is none, the second best is trained on unless it is clearly worse.
    """
    ordered = sorted(results, key=lambda result: result.loss)
    best, rest = ordered[0], [result for result in ordered[1:] if result.losses]
    lower = [result for result in rest if result.rate < best.rate]
    if lower:
        return [best, max(lower, key=lambda result: result.rate)]
    return [best, *(result for result in rest[:1] if not is_clearly_worse(result, best))]


def is_clearly_worse(one: TrialResult, other: TrialResult) -> bool:
    """Return whether the loss of `one` is above that of `other` by two standard errors."""
    change, error = compare(one, other)
    return change > CLEARLY_WORSE_ERRORS * error


def choose_rate(finalists: Sequence[TrialResult]) -> TrialResult:
    """Return the finalist with the lowest loss; a lower rate where it is not clearly worse.

    Short runs favour high rates.
    """
    best = min(finalists, key=lambda result: result.loss)
    lower = [
        result
        for result in finalists
        if result.losses and result.rate < best.rate and not is_clearly_worse(result, best)
    ]
    return min(lower, key=lambda result: result.rate, default=best)
