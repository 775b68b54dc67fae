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
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from simpletuner.config.environment import copy_process_environment
from simpletuner.config.launch_environment import (
    LOOPBACK,
    LaunchedProcess,
    read_launched_process,
)
from simpletuner.config.schema import RunConfig
from simpletuner.errors import ProcessLost, SimpleTunerError, TrainingStopped
from simpletuner.peers import Item, Peers

POLL_S = 0.05  # between two looks into the store
FAILURE_KEY = "failure"
LEAVE_WAIT_S = 300.0  # how long a rank waits at the end of a run for ranks that still work
FAILURE_WAIT_S = 5.0  # how long the reason for a broken connection is waited for
Store: TypeAlias = "dist.Store"  # type: ignore[name-defined]


def is_transport_error(error: BaseException) -> bool:
    """Return whether an exchange with another process failed inside torch.distributed."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def has_ended(process: int) -> bool:
    """Return whether a process of this machine has ended; a zombie still answers signal 0."""
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except OSError:
        return False


@dataclass(frozen=True)
class Failure:
    """Why the first process failed. kind: the name of the class of its error."""

    rank: int
    kind: str
    message: str
    exit_code: int

    def to_error(self) -> SimpleTunerError:
        """Return the error again, with the class that it had, so that the exit code is the same."""
        classes = {cls.__name__: cls for cls in SimpleTunerError.__subclasses__()}
        cls = classes.get(self.kind, SimpleTunerError)
        return cls(f"process {self.rank}: {self.message}")


class World(Peers):
    """The processes of a run.

    rank: 0 to size - 1. local_rank, local_size: the same among the processes of this machine.
    gpu_index: the GPU of this process, among those that torch sees.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        store: Store | None = None,
        gpu_index: int = 0,
    ) -> None:
        self.rank, self.size, self.is_main = rank, size, rank == 0
        self.local_rank, self.local_size = local_rank, local_size
        self.gpu_index = gpu_index
        self._store = store
        self._names: dict[str, int] = {}

    @property
    def is_local_main(self) -> bool:
        """Return whether this process is the first one of its machine."""
        return self.local_rank == 0

    # What each process does

    def shares(self, count: int) -> list[range]:
        """Return the places 0 to count - 1 of each rank: consecutive, the first ranks get more."""
        small, extra = divmod(count, self.size)
        ends = [rank * small + min(rank, extra) for rank in range(self.size + 1)]
        return [range(start, end) for start, end in pairwise(ends)]

    def share(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        return [(place, items[place]) for place in self.shares(len(items))[self.rank]]

    def share_passes(self, items: Sequence[Item]) -> list[tuple[int | None, Item]]:
        own: list[tuple[int | None, Item]] = [*self.share(items)]
        if self.equal_passes and items:
            longest = len(self.shares(len(items))[0])
            own += [(None, items[0])] * (longest - len(own))
        return own

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
            with self._exchange():
                dist.all_reduce(values)
        return values

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether it is set on any rank."""
        if self.size == 1:
            return list(flags)
        # On the CPU: reading the answer of a GPU would make the host wait for it in every step.
        votes = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        with self._exchange():
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        if self.size == 1:
            return [data]
        own = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._exchange():
            dist.all_gather(sizes, torch.tensor([len(data)]))
            # all_gather takes tensors of one size, and none that are empty.
            padded = torch.zeros(max(1, *map(int, sizes)), dtype=torch.uint8)
            padded[: len(own)] = own
            gathered = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(gathered, padded)
        return [
            part[: int(size)].numpy().tobytes() for part, size in zip(gathered, sizes, strict=True)
        ]

    def gather_json(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        return [json.loads(part) for part in self.gather_bytes(json.dumps(value).encode())]

    def broadcast_json(self, value: Any) -> Any:
        return self.gather_json(value if self.is_main else None)[0]

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a contiguous tensor to a rank, which must receive it."""
        with self._exchange():
            dist.send(tensor, to)

    def receive(self, like: Tensor, source: int) -> Tensor:
        """Return a tensor that another rank sends, with the shape and dtype of `like`."""
        received = torch.empty_like(like)
        with self._exchange():
            dist.recv(received, source)
        return received

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor with that of rank 0."""
        if self.size > 1:
            with self._exchange():
                dist.broadcast(tensor, 0)

    def all_reduce(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor with the sum over all ranks, in an unspecified order."""
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(tensor)

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Turn the errors of the transport into one that says which process is gone."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessLost(str(error).splitlines()[0]) from error

    # Waiting, and failing together

    def wait_for_all(self, name: str) -> None:
        """Wait, without a timeout, until every rank is here; raises the failure of another rank."""
        if self._store is None:
            return
        key = self._unique(f"all {name}")
        with self._exchange():
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
        with self._exchange():
            while not self._store.check([key]):
                if (failure := self.first_failure()) is not None:
                    raise failure.to_error()
                time.sleep(POLL_S)

    def explain(self, error: BaseException) -> BaseException:
        """Return the error that the whole run ends with, after storing it if it is the first.

        An own error of the same class as the first is returned as it is. A broken connection is the
        consequence of another rank's error, so that one is waited for; where none comes, its
        process was killed before it could say anything.
        """
        if self._store is None:
            return error
        lost = isinstance(error, ProcessLost) or is_transport_error(error)
        first = self._wait_for_failure(FAILURE_WAIT_S) if lost else None
        if lost and first is None:
            error = ProcessLost(self._describe_loss(error))
        first = first or self._record_failure(error)
        if first is None or first.rank == self.rank:
            return error
        return error if first.kind == type(error).__name__ and not lost else first.to_error()

    def _record_failure(self, error: BaseException) -> Failure | None:
        """Store why this rank fails, unless another one has failed before; return the first."""
        assert self._store is not None
        code = error.exit_code if isinstance(error, SimpleTunerError) else 1
        own = json.dumps([self.rank, type(error).__name__, str(error) or repr(error), code])
        try:
            return Failure(*json.loads(self._store.compare_set(FAILURE_KEY, "", own)))
        except (RuntimeError, ValueError):
            return None  # the process that holds the store has ended

    def _wait_for_failure(self, seconds: float) -> Failure | None:
        deadline = time.monotonic() + seconds
        while (failure := self.first_failure()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return failure

    def _describe_loss(self, error: BaseException) -> str:
        """Name the processes of this machine that have ended without a reason."""
        assert self._store is not None
        gone = []
        with contextlib.suppress(RuntimeError, ValueError):
            for rank in range(self.size):
                if not self._store.check([f"process {rank}"]):
                    continue
                host, process = json.loads(self._store.get(f"process {rank}"))
                if host == socket.gethostname() and has_ended(process):
                    gone.append(f"process {rank} (pid {process})")
        if gone:
            return (
                f"{' and '.join(gone)} ended without giving a reason; it was probably killed, as "
                "the kernel does when the memory of the host runs out. Run the same command to "
                "resume from the last checkpoint"
            )
        return (
            f"the connection to another process of this run was lost ({error}). Run the same "
            "command to resume from the last checkpoint"
        )

    def first_failure(self) -> Failure | None:
        """Return why the first rank failed; None if none has, or the store is out of reach."""
        try:
            if self._store is None or not self._store.check([FAILURE_KEY]):
                return None
            return Failure(*json.loads(self._store.get(FAILURE_KEY)))
        except (RuntimeError, ValueError):
            return None

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Leave the run together with the others.

        A launcher terminates the others when one process ends with an error, and a stop ends with
        an exit code of its own; rank 0 may hold the store. A rank that fails first closes its
        connections, so that the others, which may be waiting for it, fail too and read the reason.
        """
        if self._store is None:
            return
        # In a thread, because an exchange that hangs must not keep this alive.
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        if kind is not None:
            closing.start()
        stopped = kind is None or issubclass(kind, TrainingStopped)
        deadline = time.monotonic() + (LEAVE_WAIT_S if stopped else FAILURE_WAIT_S)
        with contextlib.suppress(RuntimeError):  # rank 0 has left, and its store with it
            self._store.add("left", 1)
            while self._store.add("left", 0) < self.size and time.monotonic() < deadline:
                time.sleep(POLL_S)
        if kind is None:
            dist.destroy_process_group()
        else:
            # Python ends a thread that comes back from C++ while it shuts down, and that aborts the
            # process: the exit code would be lost.
            closing.join(FAILURE_WAIT_S)


def run_store(server: Store, attempt: str = "0") -> Store:
    """Return the part of a store that belongs to one attempt of a run.

    After a restart the addresses of dead processes are still in the store.
    """
    return dist.PrefixStore(f"simpletuner {attempt}", server)  # type: ignore[attr-defined]


def serve_store(port: int, timeout: timedelta) -> Store:
    """Return a store that listens on the loopback interface alone; port 0 is a free one.

    torch's own would listen on every interface. Raises OSError when the port is in use.
    """
    listener = socket.create_server((LOOPBACK, port))
    return dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
    )


def _open_store(process: LaunchedProcess, timeout: timedelta) -> Store:
    """Return the store where the processes of a run find each other."""
    serves = process.rank == 0 and not process.launcher_has_store
    if serves and process.address == LOOPBACK:
        return serve_store(process.port, timeout)
    return dist.TCPStore(  # type: ignore[attr-defined]
        process.address, process.port, is_master=serves, wait_for_workers=False, timeout=timeout
    )


def join_world(run: RunConfig) -> World:
    """Join the processes that a launcher has started, if one has.

    On GPUs of NVIDIA and AMD tensors are exchanged with NCCL, on other devices with gloo.
    """
    process = read_launched_process(copy_process_environment(), run.distributed)
    if process is None or process.size == 1:
        return World()
    timeout = timedelta(seconds=run.distributed.ddp_timeout)
    store = run_store(_open_store(process, timeout), process.attempt)
    on_gpu = run.model.device in ("auto", "cuda") and torch.cuda.is_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
        rank=process.rank,
        world_size=process.size,
        timeout=timeout,
        device_id=torch.device("cuda", process.gpu_index) if on_gpu else None,
    )
    store.set(f"process {process.rank}", json.dumps([socket.gethostname(), os.getpid()]))
    return World(
        process.rank,
        process.size,
        process.local_rank,
        process.local_size,
        store,
        process.gpu_index,
    )
