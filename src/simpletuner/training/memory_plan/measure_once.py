"""Measure a step unless the same one was measured before."""

from __future__ import annotations

from collections.abc import Callable

from simpletuner.config.schema import RunConfig
from simpletuner.models.family import BlockMemoryPolicy, ModelFamily, ModelSpec
from simpletuner.training.memory_plan import fake_step, plan_cache
from simpletuner.training.memory_plan.fake_step import BatchShape, StepMeasurement

Progress = Callable[[str], object]


def silent(text: str) -> None:
    """Show no progress."""


def measure_once(
    run: RunConfig,
    family: ModelFamily,
    spec: ModelSpec,
    memory: BlockMemoryPolicy,
    feed: BatchShape,
    granule: int,
    progress: Progress,
) -> StepMeasurement:
    """Return the measurement of a step, from the cache or after a report of progress."""
    inputs = spec, memory, feed, granule
    return plan_cache.get_or_measure(
        plan_cache.cache_key(run, *inputs),
        lambda: fake_step.measure_fake_step(run, family, *inputs),
        lambda: progress(f"measuring a step with {memory.checkpointed} checkpointed blocks ..."),
    )
