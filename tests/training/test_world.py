"""The end of a process in a world of several."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("torch")

import torch.distributed as dist

from simpletuner.errors import TrainingStopped
from simpletuner.training.world import World


class LeftAtOnce:
    """A store in which every process has left the run."""

    def add(self, key: str, amount: int) -> int:
        return 1


def test_connections_are_closed_before_a_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that still closes them while Python shuts down aborts the process."""
    closed = threading.Event()

    def close_slowly() -> None:
        time.sleep(0.1)
        closed.set()

    monkeypatch.setattr(dist, "destroy_process_group", close_slowly)
    world = World(size=1, store=LeftAtOnce())
    with pytest.raises(TrainingStopped), world:
        raise TrainingStopped("stopped")
    assert closed.is_set()
