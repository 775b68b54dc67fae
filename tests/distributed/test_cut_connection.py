"""The connection between two processes is cut, or carries nothing any more: both end."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.training.run_folder import RunFolder
from tests.distributed.harness import run_ranks
from tests.distributed.test_replicated import Trainings, outcome, train_project

TIMEOUT_S = 4


def peer_sockets() -> list[int]:
    """Return the descriptors of this process' connections, but for those to the store."""
    store_port = int(os.environ["MASTER_PORT"])
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6):
                    ports = (copy.getsockname()[1], copy.getpeername()[1])
                    found += [int(name)] if store_port not in ports else []
        except OSError:
            continue  # it listens, or has been closed
    return found


def cut(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


# A filter of one instruction, "return 0": the kernel drops every packet, acknowledgements included.
DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
SO_ATTACH_FILTER = 26


def silence(descriptor: int) -> None:
    """Keep the connection open, but let nothing arrive, as a proxy that stops forwarding."""
    program = struct.pack("HP", 1, ctypes.addressof(DROP_ALL))
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


WAYS = {"cut": cut, "silent": silence}


def train_until_disconnected(root: str, options: dict[str, Any], way: str) -> None:
    """Lose the connections of process 1 in the second step."""
    from simpletuner.training import loop

    def begin_step(context: Any, step: int) -> Any:
        if step == 1 and os.environ["RANK"] == "1":
            descriptors = peer_sockets()
            assert descriptors
            for descriptor in descriptors:
                WAYS[way](descriptor)
        return set_learning_rate(context, step)

    set_learning_rate: Callable[..., Any] = loop.set_learning_rate
    loop.set_learning_rate = begin_step
    train_project(root, options)


@pytest.mark.parametrize("way", ["cut", pytest.param("silent", marks=pytest.mark.slow)])
def test_both_processes_end_and_the_next_start_completes(
    way: str, trainings: Trainings, whole: Path
) -> None:
    run_dir = trainings.root / way
    options = {
        **trainings.options, "output_dir": str(run_dir), "gradient_accumulation_steps": 1,
        "ddp_timeout": TIMEOUT_S,
    }  # fmt: skip
    results = run_ranks(2, train_until_disconnected, str(trainings.root), options, way)
    assert [result.error[0] for result in results if result.error] == ["ProcessLost"] * 2
    assert [result.exit_code for result in results] == [0, 0]  # none was killed
    end = json.loads((run_dir / "exit.json").read_text())
    assert (end["exit_code"], end["step"]) == (13, 1)
    assert "the connection to another process of this run was lost" in end["message"]
    with RunFolder(run_dir):
        pass  # the lock is free
    trainings.train(way, 2, gradient_accumulation_steps=1)
    assert outcome(run_dir) == outcome(whole)
