"""Saved tensors of blocks that wait elsewhere, and when their copies start."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simpletuner.models.offloaded_inputs import FinishCopy, OffloadedInputs

META = torch.device("meta")


class Copies:
    """Copies to a made-up host and back: what was started, finished and computed, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.hosts: list[weakref.ref[Tensor]] = []
        self.names: dict[int, int] = {}
        self.shapes: dict[int, torch.Size] = {}
        self.pending = self.most_pending = 0

    def to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(1)
        self.hosts.append(weakref.ref(host))
        self.names[id(host)] = len(self.hosts) - 1
        self.shapes[id(host)] = tensor.shape
        return host

    def start_back(self, host: Tensor) -> FinishCopy:
        number, shape = self.names[id(host)], self.shapes[id(host)]
        self.log.append(f"start {number}")
        self.pending += 1
        self.most_pending = max(self.most_pending, self.pending)

        def finish() -> Tensor:
            self.pending -= 1
            self.log.append(f"finish {number}")
            return torch.empty(shape, device=META)

        return finish


def forward(copies: Copies, offloaded: OffloadedInputs, blocks: int) -> Tensor:
    """Two streams through blocks that log when they are computed."""

    def run(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        copies.log.append(f"compute {number}")
        return x * y, x + y.exp()

    x, y = (torch.empty(3, device=META, requires_grad=True) for _ in range(2))
    for number in range(blocks):
        with offloaded.save_block():
            x, y = checkpoint(run, number, x, y, use_reentrant=False)
    return x + y


def test_the_inputs_of_the_block_before_come_while_one_computes() -> None:
    copies = Copies()
    offloaded = OffloadedInputs(copies.to_host, copies.start_back)
    out = forward(copies, offloaded, 3)
    copies.log.clear()
    out.backward(torch.empty(3, device=META))
    assert copies.log == [
        "start 4", "start 5", "start 2", "start 3", "finish 4", "finish 5", "compute 2",
        "start 0", "start 1", "finish 2", "finish 3", "compute 1",
        "finish 0", "finish 1", "compute 0",
    ]  # fmt: skip
    assert copies.most_pending <= 4, "the inputs of two blocks"
    del out
    gc.collect()
    assert not any(host() is not None for host in copies.hosts)


def test_a_pass_without_a_backward_pass_leaves_nothing() -> None:
    copies = Copies()
    offloaded = OffloadedInputs(copies.to_host, copies.start_back)
    forward(copies, offloaded, 2)
    gc.collect()
    assert not any(host() is not None for host in copies.hosts)
    out = forward(copies, offloaded, 1)
    copies.log.clear()
    out.backward(torch.empty(3, device=META))
    assert copies.log == ["start 4", "start 5", "finish 4", "finish 5", "compute 0"]


def test_what_is_on_the_host_stays_there() -> None:
    """Older checkpoints hand the hooks an empty tensor of the CPU, which no stream of a GPU knows."""
    copies = Copies()
    x = torch.ones(2, requires_grad=True)
    with OffloadedInputs(copies.to_host, copies.start_back).save_block():
        out = x * x
    out.sum().backward()
    assert copies.hosts == copies.log == []
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]
