"""The verdict on the held-out losses of a run: whether it still learns, is flat, or overfits.

Every measurement uses the same samples, sigmas and noise, so two of them are compared in pairs: the
mean difference over the samples, and its standard error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.events.event_types import VerdictReached

DEFAULT_PATIENCE = 3
MIN_MEASUREMENTS = 3  # with the one at step 0
OVERFITTING_ERRORS = 2.0  # standard errors that the last two measurements are above the best
LEARNT_ERRORS = 2.0  # standard errors that the loss has fallen where anything was learnt
RESISTING_DEVIATIONS = 3.0
MIN_COMPARED_IMAGES = 8
DEVIATIONS_PER_MAD = 1.4826  # of a normal distribution


def paired_change(
    losses: Mapping[str, float], baseline: Mapping[str, float]
) -> tuple[float, float]:
    """Return the mean of loss - baseline over the samples in both, and its standard error.

    The spread between easy and hard images cancels in the pairs. The standard error of a single
    pair is given as 0.
    """
    differences = [loss - baseline[sample] for sample, loss in losses.items() if sample in baseline]
    if not differences:
        return 0.0, 0.0
    error = (
        statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    )
    return statistics.fmean(differences), error


class LossTrajectory:
    """The held-out losses of every measurement of a run.

    steps, losses: of each measurement, in order; losses by sample id. The reference is the last
    measurement that was lower than the reference before it by more than one standard error, so
    that many small improvements count and noise does not.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[dict[str, float]] = []
        self._reference = 0

    def clear(self) -> None:
        """Forget all measurements."""
        self.steps, self.losses, self._reference = [], [], 0

    def add(self, step: int, losses: Mapping[str, float]) -> None:
        """Add a measurement; one of other samples than before starts again."""
        if self.losses and self.losses[-1].keys() != losses.keys():
            self.clear()
        self.steps.append(step)
        self.losses.append(dict(losses))
        change, error = paired_change(losses, self.losses[self._reference])
        if change < -error:
            self._reference = len(self.steps) - 1

    @property
    def reference_step(self) -> int:
        return self.steps[self._reference]

    @property
    def stale_measurements(self) -> int:
        """Measurements since the reference, none of which was lower by one standard error."""
        return max(0, len(self.steps) - 1 - self._reference)

    def best_index(self) -> int:
        """Return the position of the measurement with the lowest mean, the first of equal ones."""
        means = [statistics.fmean(losses.values()) for losses in self.losses]
        return means.index(min(means))

    def judge(self, patience: int = DEFAULT_PATIENCE) -> VerdictReached:
        """Return the verdict after the last measurement, which must exist.

        patience: measurements without an improvement after which the loss is flat.
        """
        last, best = len(self.steps) - 1, self.best_index()
        verdict, since = "learning", self._reference
        if len(self.steps) < MIN_MEASUREMENTS:
            verdict, since = "unknown", 0
        elif best < last - 1 and all(self._is_above(at, best) for at in (last - 1, last)):
            verdict, since = "overfitting", best
        elif self.stale_measurements >= patience:
            verdict = "flat"
            learnt, error = paired_change(self.losses[last], self.losses[0])
            if learnt > -LEARNT_ERRORS * error:
                since = 0
        compared = max(0, since - 1) if verdict == "learning" and since == last else since
        change, error = paired_change(self.losses[last], self.losses[compared])
        return VerdictReached(
            self.steps[last],
            verdict,
            self.steps[compared],
            self.steps[best],
            len(self.losses[last]),
            change,
            error,
        )

    def _is_above(self, at: int, best: int) -> bool:
        change, error = paired_change(self.losses[at], self.losses[best])
        return change > OVERFITTING_ERRORS * error

    def state_dict(self) -> dict[str, object]:
        """Return the measurements, as JSON."""
        samples = list(self.losses[-1]) if self.losses else []
        rows = [[losses[name] for name in samples] for losses in self.losses]
        return {"steps": self.steps, "samples": samples, "losses": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clear()
        for step, row in zip(state["steps"], state["losses"], strict=True):
            self.add(step, dict(zip(state["samples"], row, strict=True)))


def find_resisting(losses: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the images whose loss fell far less than that of the others, the worst first.

    losses: sample id -> loss before and after, on the same noise. The ratios of after to before are
    compared by the median and the median absolute deviation, which outliers do not move. Empty for
    fewer than MIN_COMPARED_IMAGES, and where nothing was learnt.
    """
    ratios = {name: after / before for name, (before, after) in losses.items() if before > 0}
    if len(ratios) < MIN_COMPARED_IMAGES:
        return []
    median = statistics.median(ratios.values())
    spread = DEVIATIONS_PER_MAD * _median_deviation(list(ratios.values()), median)
    limit = median + RESISTING_DEVIATIONS * spread
    names = [name for name, ratio in ratios.items() if ratio > limit and median < 1.0]
    return sorted(names, key=lambda name: -ratios[name])


def _median_deviation(values: Sequence[float], median: float) -> float:
    return statistics.median(abs(value - median) for value in values)
