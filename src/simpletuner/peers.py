"""The processes that train one run together, as the packages below training see them.

training/world.py has the real ones. Everything that is shared out gets a place, and results are put
together by place, so the number of processes changes no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


class Peers:
    """One process that works alone; World overrides this for several.

    is_main: whether this process writes the run folder and reports. equal_passes: whether every
    process must run the network equally often, because each holds a part of it.
    """

    is_main = True
    equal_passes = False

    def share(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """Return the items of this process, each with its place among all."""
        return list(enumerate(items))

    def share_passes(self, items: Sequence[Item]) -> list[tuple[int | None, Item]]:
        """Return the items of this process where each costs one pass through the network.

        With equal_passes some processes repeat an item: it has no place, and its result is not
        used.
        """
        return list(enumerate(items))

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the bytes of every process, in order; every process must call it."""
        return [data]

    def gather_json(self, value: Any) -> list[Any]:
        """Return the value of every process, in order; a value is what JSON holds."""
        return [value]

    def broadcast_json(self, value: Any) -> Any:
        """Return the value of the main process; the values of the others are not used."""
        return value


ALONE = Peers()
