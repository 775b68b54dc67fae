"""The micro-batches of a run by their number, loaded a little ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from threading import Lock

from simpletuner.cache.batch_types import Batch
from simpletuner.config.schema import RunConfig
from simpletuner.data.sample_order import SampleOrder
from simpletuner.data.sample_types import MicroBatchPlan
from simpletuner.training.loop import MicroBatchShape, TrainSchedule
from simpletuner.training.prepare import PreparedInputs

PREFETCH_DEPTH = 4


class BatchPrefetcher:
    """Loads the next PREFETCH_DEPTH micro-batches on one thread.

    Which samples a number stands for is a pure function, so a stopped run loses nothing.
    """

    def __init__(self, load: Callable[[int], Batch], last: int) -> None:
        self._load = load
        self._last = last
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._pending: dict[int, Future[Batch]] = {}

    def __call__(self, number: int) -> Batch:
        for ahead in range(number, min(number + PREFETCH_DEPTH, self._last + 1)):
            if ahead not in self._pending:
                self._pending[ahead] = self._pool.submit(self._load, ahead)
        return self._pending.pop(number).result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()


def build_batch_loader(
    run: RunConfig,
    prepared: PreparedInputs,
    order: SampleOrder,
    schedule: TrainSchedule,
    closing: ExitStack,
) -> tuple[BatchPrefetcher, Callable[[int], MicroBatchShape]]:
    """Return two functions of a micro-batch's number: its batch, and its shape."""
    order_lock = Lock()  # the loop and the prefetch thread ask for different numbers at once

    @lru_cache(64)
    def micro_batch(number: int) -> MicroBatchPlan:
        with order_lock:
            return order.micro_batch(number)

    def shape(number: int) -> MicroBatchShape:
        visits = micro_batch(number).visits
        width, height = prepared.train.placed_samples[visits[0].sample_index].bucket_px
        return MicroBatchShape(len(visits), width * height // prepared.constants.token_px**2)

    loader = prepared.make_batches(prepared.train, run.cache.vae_cache_sample, run.training.seed)
    last = schedule.total_steps * schedule.accumulation_steps - 1
    prefetcher = BatchPrefetcher(lambda number: loader.load(micro_batch(number)), last)
    closing.callback(prefetcher.close)
    return prefetcher, shape
