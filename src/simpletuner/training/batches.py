"""The micro-batches of a run by their number, loaded a little ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from threading import Lock

from simpletuner.cache.batch_types import Batch
from simpletuner.config.schema import RunConfig
from simpletuner.data.sample_order import SampleOrder
from simpletuner.data.sample_types import MicroBatchPlan
from simpletuner.flow.objective import sample_noise_pair
from simpletuner.training.device import ComputeDevice
from simpletuner.training.loop import MicroBatchShape, TrainSchedule
from simpletuner.training.prepare import PreparedInputs
from simpletuner.training.world import World

PREFETCH_DEPTH = 4


class BatchPrefetcher:
    """Loads the next PREFETCH_DEPTH micro-batches of this process on one thread.

    next_number: the number that this process asks for after a number; None at the end of the run.
    Which samples a number stands for is a pure function, so a stopped run loses nothing.
    """

    def __init__(
        self, load: Callable[[int], Batch], next_number: Callable[[int], int | None]
    ) -> None:
        self._load = load
        self._next_number = next_number
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._pending: dict[int, Future[Batch]] = {}

    def __call__(self, number: int) -> Batch:
        ahead: int | None = number
        for _ in range(PREFETCH_DEPTH):
            if ahead is None:
                break
            if ahead not in self._pending:
                self._pending[ahead] = self._pool.submit(self._load, ahead)
            ahead = self._next_number(ahead)
        return self._pending.pop(number).result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()


def build_batch_loader(
    run: RunConfig,
    prepared: PreparedInputs,
    order: SampleOrder,
    schedule: TrainSchedule,
    world: World,
    device: ComputeDevice,
    closing: ExitStack,
) -> tuple[BatchPrefetcher, Callable[[int], MicroBatchShape]]:
    """Return two functions of a micro-batch's number: its batch, and its shape.

    For a GPU the batches wait in page-locked memory.
    """
    order_lock = Lock()  # the loop and the prefetch thread ask for different numbers at once

    @lru_cache(512)  # the sigmas of a chunk of steps are prepared ahead
    def micro_batch(number: int) -> MicroBatchPlan:
        with order_lock:
            return order.micro_batch(number)

    offsets = {dataset.id: dataset.timestep_sampling_offset for dataset in prepared.train_sets}

    def shape(number: int) -> MicroBatchShape:
        visits = micro_batch(number).visits
        first = prepared.train.placed_samples[visits[0].sample_index]
        width, height = first.bucket_px
        image_tokens = width * height // prepared.constants.token_px**2
        return MicroBatchShape(len(visits), image_tokens, offsets[first.sample.dataset])

    loader = prepared.make_train_batches(run.cache.vae_cache_sample, run.training.seed)
    per_step = schedule.accumulation_steps
    own = world.shares(per_step)[world.rank]

    def next_number(number: int) -> int | None:
        step, place = divmod(number, per_step)
        if place + 1 not in own:
            step, place = step + 1, own.start - 1
        return step * per_step + place + 1 if step < schedule.total_steps else None

    def load(number: int) -> Batch:
        batch = loader.load(micro_batch(number))
        # Drawn on this thread, because on that of the loop the GPU would wait for it.
        noise = sample_noise_pair(
            batch.visit_keys, batch.latents.shape, run.flow, run.training.seed
        )
        batch = replace(batch, noise=noise)
        return batch.pin_memory() if device.device.type == "cuda" else batch

    prefetcher = BatchPrefetcher(load, next_number)
    closing.callback(prefetcher.close)
    return prefetcher, shape
