"""Live bytes and products, counted while a step runs on tensors that hold nothing (or on real ones)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# What a storage was made for. The first two are said by whoever makes them; a step's own are told apart
# by whether autograd is running when they are made.
PARTS = ("weights", "adapters", "optimizer", "activations", "temporaries")
CUDA_GRANULE = 512  # bytes: its caching allocator rounds each tensor up to this; a CPU's rounds nothing

aten = torch.ops.aten
# The CPU's flash attention takes the same leading arguments as the GPU's.
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class LiveBytes(TorchDispatchMode):
    """Each storage counts from the operation that made it until Python's last reference to it is gone.

    part: what new storages belong to outside of `step`. peak: bytes by part at the highest moment since
    `restart`. Numbers that code reads off a tensor are 1: empty tensors have none, and no branch of a step
    depends on more than their being finite.
    """

    def __init__(self, granule: int) -> None:
        super().__init__()
        self.part = "weights"
        self.live = dict.fromkeys(PARTS, 0)
        self._granule = granule
        self._known: set[int] = set()
        self._stepping = self._past_backward = False
        self.restart()

    def restart(self) -> None:
        self.total = sum(self.live.values())
        self.flops, self.highest, self.peak = 0, self.total, dict(self.live)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, parts are told apart by the moment: forward, backward, optimizer."""
        self._stepping = True
        yield
        self._stepping = False

    def forward_begins(self) -> None:
        """With every micro-batch: what follows is a forward pass until autograd runs."""
        self._past_backward = False

    def _part_now(self) -> str:
        if not self._stepping:
            return self.part
        if torch._C._current_graph_task_id() != -1:
            self._past_backward = True
            return "temporaries"
        return "optimizer" if self._past_backward else "activations"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            kind = cast(Tensor, args[0]).dtype
            return 1.0 if kind.is_floating_point else kind is torch.bool or 1
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self._see(each)
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self._granule) * self._granule
        part = self._part_now()
        self._known.add(key)
        self.live[part] += size
        self.total += size
        if self.total > self.highest:
            self.highest, self.peak = self.total, dict(self.live)
        weakref.finalize(storage, self._gone, key, part, size).atexit = False

    def _gone(self, key: int, part: str, size: int) -> None:
        self._known.discard(key)
        self.live[part] -= size
        self.total -= size
