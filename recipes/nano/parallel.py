"""A pure function over many arguments, in order, computed ahead by worker processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")
AHEAD = 3  # tasks per worker that are computed or wait


def map_in_order(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], workers: int
) -> Iterator[Result]:
    """Yield function(argument) for each; with no workers, computed when it is asked for.

    function must be importable from a module (workers are started anew, not forked: torch has
    threads).
    """
    if workers == 0:
        yield from map(function, arguments)
        return
    waiting = iter(arguments)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending = deque(pool.submit(function, one) for one in islice(waiting, workers * AHEAD))
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(function, one) for one in islice(waiting, 1))
        finally:
            for future in pending:
                future.cancel()
