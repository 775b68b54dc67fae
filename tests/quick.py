"""Bounds on CPU time that mean the same on every CPU, busy or not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

STANDARD_S = 0.05  # CPU time of `standard` on the CPU for which the bounds were set


def standard() -> int:
    """Do a fixed amount of interpreted work on small objects."""
    words: dict[str, int] = {}
    for number in range(200_000):
        word = f"key {number % 5000}"
        words[word] = words.get(word, 0) + len(word.split(" "))
    return sum(words.values())


def own_s() -> float:
    """CPU time of this thread."""
    return time.thread_time()


def children_s() -> float:
    """CPU time of the child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def assert_quick(
    act: Callable[[], object], bound_s: float, clock: Callable[[], float] = own_s, tries: int = 3
) -> None:
    """Fail if `act` takes `bound_s` of CPU time or more in each try.

    tries: 1 where the second call would find results of the first.

    On a CPU that is slower than that of the bounds, or busy, the bound is longer in the ratio in
    which the standard work, done right after it, takes longer. A faster CPU does not shorten it.
    """
    found = []
    for _ in range(tries):
        begun = clock()
        act()
        took = clock() - begun
        if took < bound_s:
            return
        begun = time.thread_time()
        standard()
        slowness = (time.thread_time() - begun) / STANDARD_S
        if took < bound_s * slowness:
            return
        found.append(f"{took:.3g} s on a CPU that is {slowness:.3g} times as slow")
    raise AssertionError(f"not within {bound_s} s: {', '.join(found)}")
