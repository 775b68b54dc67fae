"""Several processes of one run, on this machine, in seconds.

torch and the package are imported once, in a server process from which every rank is forked. The
ranks find each other through a store on loopback, as under a launcher.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 240.0
# There is one server for all tests of a process, and one list of what it imports.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.distributed.harness",
        "tests.e2e.training_project",
        "simpletuner.training.launcher",
        "torch.distributed.fsdp",
        "tests.distributed.frozen_imports",
    ]
)


@dataclass(frozen=True)
class RankResult:
    """value: what the function returned; error: the error it raised, as its class and message."""

    value: Any = None
    error: tuple[str, str] | None = None
    exit_code: int | None = 0


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(
    count: int,
    function: Callable[..., Any],
    arguments: Sequence[Any] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[list[Any], list[Connection]]:
    """Start `function(*arguments)` on each rank; return the processes and where they answer."""
    port = free_port()
    processes, answers = [], []
    for rank in range(count):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        process = CONTEXT.Process(
            target=_run_rank, args=(theirs, variables, function, tuple(arguments)), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        answers.append(ours)
    return processes, answers


def run_ranks(
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
) -> list[RankResult]:
    """Run `function(*arguments)` on `count` ranks at once, and return the result of each."""
    processes, answers = start_ranks(count, function, arguments, environment)
    return [wait_for_rank(*pair) for pair in zip(processes, answers, strict=True)]


def wait_for_rank(process: Any, answer: Connection) -> RankResult:
    """Return what a rank answered; an exit code alone for one that was killed."""
    if not answer.poll(TIMEOUT_S):
        process.kill()
        raise AssertionError(f"a rank did not end within {TIMEOUT_S:g} s")
    try:
        value, error = answer.recv()
    except EOFError:
        process.join(TIMEOUT_S)
        return RankResult(exit_code=process.exitcode)
    process.join(TIMEOUT_S)
    return RankResult(value, error, process.exitcode)


def values(results: Sequence[RankResult]) -> list[Any]:
    """Return what every rank returned; fails where one raised."""
    for rank, result in enumerate(results):
        assert (result.error, result.exit_code) == (None, 0), rank
    return [result.value for result in results]


def _run_rank(
    answer: Connection,
    environment: Mapping[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        answer.send((function(*arguments), None))
    except BaseException as error:
        traceback.print_exc()
        answer.send((None, (type(error).__name__, str(error))))
