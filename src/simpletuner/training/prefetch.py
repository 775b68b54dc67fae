"""Batches are loaded a little ahead of the step that needs them; order is pure, so nothing can get lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from simpletuner.cache.batch_types import Batch

PREFETCH_DEPTH = 4


class BatchPrefetcher:
    """Calls load(number) for the next DEPTH micro-batches on one thread."""

    def __init__(self, load: Callable[[int], Batch], last: int) -> None:
        self._load, self._last = load, last
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
