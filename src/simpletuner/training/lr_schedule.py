"""The learning rate, a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math
from collections.abc import Callable

from simpletuner.config.schema import OptimizerOptions

# progress in [0, 1) after the warm-up, power -> share of the way from lr_end up to learning_rate
LR_SCHEDULERS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, power: 1.0,
    "linear": lambda progress, power: 1.0 - progress,
    "cosine": lambda progress, power: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "polynomial": lambda progress, power: (1.0 - progress) ** power,
}


def learning_rate(options: OptimizerOptions, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (0 is the first) of a run of `total_steps`.

    The warm-up rises linearly and reaches learning_rate with its last step, so no step has rate 0. The
    shape then spans all the steps that remain and would reach lr_end one step after the run's last.
    """
    warmup = options.lr_warmup_steps
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    share = LR_SCHEDULERS[options.lr_scheduler](progress, options.lr_power)
    return options.lr_end + (options.learning_rate - options.lr_end) * share


def effective_learning_rate(options: OptimizerOptions, effective_batch: int) -> float:
    """learning_rate after lr_scale (times the samples of a step) or lr_scale_sqrt (times their root).

    effective_batch: samples of one optimizer step, over accumulation and devices.
    """
    factor = float(effective_batch) if options.lr_scale else 1.0
    return options.learning_rate * (math.sqrt(effective_batch) if options.lr_scale_sqrt else factor)
