"""Rendezvous of the machines of a run, and the store where its processes exchange addresses."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from simpletuner.config.launch_environment import DEFAULT_PORT, LOOPBACK
from simpletuner.config.schema import DistributedOptions
from simpletuner.errors import ConfigError
from simpletuner.training.world import serve_store

STORE_TIMEOUT = timedelta(seconds=60)
RUN_ID = "simpletuner"


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of one machine: a store that listens on the loopback interface alone.

    torch's own would listen on every interface.
    """

    def __init__(self, port: int | None) -> None:
        try:
            self.server = serve_store(port or 0, STORE_TIMEOUT)
        except OSError as error:
            raise ConfigError(
                f"main_process_port = {port}: cannot be used: {error.strerror}; choose another "
                "one, or leave it out for a free one"
            ) from error

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = dist.PrefixStore("agent", self.server)  # type: ignore[attr-defined]
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self.server.port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: the store is closed with this object."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return RUN_ID

    def shutdown(self) -> bool:
        return True


def make_rendezvous(options: DistributedOptions) -> RendezvousHandler:
    """Return how the machines of the run find each other."""
    if options.num_machines == 1:
        return LoopbackRendezvous(options.main_process_port)
    port = options.main_process_port or DEFAULT_PORT
    address = options.main_process_ip or ""
    # The endpoint is host:port, and an IPv6 address has colons of its own.
    host = f"[{address}]" if ":" in address else address
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="static",
            endpoint=f"{host}:{port}",
            run_id=RUN_ID,
            min_nodes=options.num_machines,
            max_nodes=options.num_machines,
            rank=options.machine_rank,
            timeout=options.ddp_timeout,
        )
    )
