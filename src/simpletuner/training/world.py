"""The processes that train one run together: who they are, what each does, what they exchange.

A process is called a rank, as in torch.distributed. Ranks share out whole micro-batches, and
results are put together by place, so a run with several processes equals a run with one. No other
module asks for a rank: a world of one process answers every question here without communication.

Ranks exchange tensors and JSON, never pickles. Long waits go through the store, which has no
timeout of its own and where the first process that fails leaves its reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from simpletuner import errors
from simpletuner.errors import SimpleTunerError

Item = TypeVar("Item")

POLL_S = 0.05  # between two looks into the store
FAILURE_KEY = "failure"
DEFAULT_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Failure:
    """Why the first process failed. kind: the name of the class of its error."""

    rank: int
    kind: str
    message: str
    exit_code: int

    def to_error(self) -> SimpleTunerError:
        """Return the error again, with the class that it had, so that the exit code is the same."""
        cls = getattr(errors, self.kind, SimpleTunerError)
        is_known = isinstance(cls, type) and issubclass(cls, SimpleTunerError)
        return (cls if is_known else SimpleTunerError)(f"process {self.rank}: {self.message}")


class World:
    """The processes of a run.

    rank: 0 to size - 1. local_rank, local_size: the same among the processes of this machine.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        store: dist.Store | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self._store = store
        self._names: dict[str, int] = {}

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder and reports."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this process is the first one of its machine."""
        return self.local_rank == 0

    # What each process does

    def shares(self, count: int) -> list[range]:
        """Return the places 0 to count - 1 of each rank: consecutive, the first ranks get more."""
        small, extra = divmod(count, self.size)
        ends = [rank * small + min(rank, extra) for rank in range(self.size + 1)]
        return [range(start, end) for start, end in pairwise(ends)]

    def share(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """Return this rank's items, each with its place among all."""
        return [(place, items[place]) for place in self.shares(len(items))[self.rank]]

    # What they exchange

    def sum_by_place(self, own: Mapping[int, Tensor], count: int, device: torch.device) -> Tensor:
        """Return the numbers of all ranks by place, (count,) float32 on the device.

        own: place -> number of this rank, a tensor without dimensions. Every place belongs to one
        rank, so nothing is rounded: the other ranks add 0.
        """
        values = torch.zeros(count, dtype=torch.float32, device=device)
        for place, value in own.items():
            values[place] = value
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether it is set on any rank."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def gather_json(self, value: Any) -> list[Any]:
        """Return the value of every rank, in the order of the ranks; a value is what JSON holds."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(gathered, sizes, strict=True)
        ]

    def broadcast_json(self, value: Any) -> Any:
        """Return rank 0's value on every rank; the value of the others is not used."""
        return self.gather_json(value if self.is_main else None)[0]

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a contiguous tensor to a rank, which must receive it."""
        dist.send(tensor, to)

    def receive(self, like: Tensor, source: int) -> Tensor:
        """Return a tensor that another rank sends, with the shape and dtype of `like`."""
        received = torch.empty_like(like)
        dist.recv(received, source)
        return received

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor with that of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def all_reduce(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor with the sum over all ranks, in an unspecified order."""
        if self.size > 1:
            dist.all_reduce(tensor)

    # Waiting, and failing together

    def wait_for_all(self, name: str) -> None:
        """Wait, without a timeout, until every rank is here; raises the failure of another rank."""
        if self._store is None:
            return
        key = self._unique(f"all {name}")
        if self._store.add(key, 1) == self.size:
            self._store.set(f"{key} done", "1")
        self._wait_for(f"{key} done")

    @contextlib.contextmanager
    def main_first(self, name: str) -> Iterator[None]:
        """Run the body on rank 0 before it runs on the others, which wait without a timeout."""
        key = self._unique(f"main {name}")
        if self._store is not None and not self.is_main:
            self._wait_for(key)
        yield
        if self._store is not None and self.is_main:
            self._store.set(key, "1")

    def _unique(self, name: str) -> str:
        """Return a key that every rank gets by the same sequence of calls."""
        self._names[name] = self._names.get(name, 0) + 1
        return f"{name} {self._names[name]}"

    def _wait_for(self, key: str) -> None:
        assert self._store is not None
        while not self._store.check([key]):
            if (failure := self.first_failure()) is not None:
                raise failure.to_error()
            time.sleep(POLL_S)

    def record_failure(self, error: BaseException) -> Failure | None:
        """Store why this rank fails, unless another one has failed before; return the first.

        None where the store is out of reach: its process has ended.
        """
        if self._store is None:
            return None
        code = error.exit_code if isinstance(error, SimpleTunerError) else 1
        own = json.dumps([self.rank, type(error).__name__, str(error) or repr(error), code])
        try:
            return Failure(*json.loads(self._store.compare_set(FAILURE_KEY, "", own)))
        except (RuntimeError, ValueError):
            return None

    def first_failure(self) -> Failure | None:
        """Return why the first rank failed; None if none has, or the store is out of reach."""
        try:
            if self._store is None or not self._store.check([FAILURE_KEY]):
                return None
            return Failure(*json.loads(self._store.get(FAILURE_KEY)))
        except (RuntimeError, ValueError):
            return None

    def close(self) -> None:
        """Leave the process group. A rank that fails does not wait for the others here."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def world_size_from_environment() -> int:
    """Return how many processes the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_world(device_type: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> World:
    """Join the processes that a launcher has started with RANK, WORLD_SIZE and MASTER_ADDR.

    device_type: "cuda" exchanges tensors with NCCL, everything else with gloo. timeout_s: how long
    a rank waits for another one within one exchange.
    """
    size = world_size_from_environment()
    if size == 1:
        return World()
    rank = int(os.environ["RANK"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    timeout = timedelta(seconds=timeout_s)
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    server = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not agent_has_store,
        timeout=timeout,
    )
    # A prefix for each attempt: after a restart the addresses of the dead processes are still there.
    store = dist.PrefixStore(f"simpletuner {attempt}", server)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=torch.device("cuda", local_rank) if device_type == "cuda" else None,
    )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(rank, size, local_rank, local_size, store)
