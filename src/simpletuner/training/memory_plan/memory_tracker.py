"""Count live bytes and FLOPs while a step runs, on tensors without data or on real ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# The use of a storage. The code that creates weights, adapters and optimizer state sets it; in a
# step it depends on whether autograd is running when the storage is created.
MEMORY_PARTS = ("weights", "adapters", "optimizer", "activations", "temporaries")
# CUDA's caching allocator rounds the size of each tensor up to this; a CPU's does not round.
CUDA_ALLOCATION_BYTES = 512

aten = torch.ops.aten
# The CPU's flash attention takes the same leading arguments as the GPU's.
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class SegmentBytes:
    """The effect of a part of a step, in bytes by part relative to its start.

    change: from its start to its end. peak: at its highest moment. peak_activations: the most
    activations at one moment.
    """

    change: dict[str, int]
    peak: dict[str, int]
    peak_activations: int
    flops: float


@dataclass
class _Moment:
    """The highest moments so far, and what is alive and computed when a segment starts."""

    live: dict[str, int]
    peak_total: int
    peak: dict[str, int]
    peak_activations: int
    flops: float


class MemoryTrackerMode(TorchDispatchMode):
    """Counts each storage from the operation that creates it until its last reference is gone.

    current_part: the part of new storages outside of `track_step`. peak_bytes: bytes by part at the
    highest moment since `reset_peak`. peak_activation_bytes: the most activations at one moment,
    which is another moment than the highest one where the gradients are larger than they.

    Reading a number from a tensor gives 1, because the tensors have no data; the branches of a step
    depend only on numbers being finite.
    """

    def __init__(self, granule: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.current_part = "weights"
        self.live_bytes = dict.fromkeys(MEMORY_PARTS, 0)
        self._granule = granule
        self._tracked: set[int] = set()
        self._stepping = self._past_backward = False
        self.reset_peak()

    def reset_peak(self) -> None:
        self.total_bytes = sum(self.live_bytes.values())
        self.flops: float = 0
        self._start_peak()

    def _start_peak(self) -> None:
        self.peak_total_bytes = self.total_bytes
        self.peak_bytes = dict(self.live_bytes)
        self.peak_activation_bytes = self.live_bytes["activations"]

    def begin_segment(self) -> None:
        """Start a part of the step that is counted by itself; one at a time."""
        self._before_segment = _Moment(
            dict(self.live_bytes),
            self.peak_total_bytes,
            self.peak_bytes,
            self.peak_activation_bytes,
            self.flops,
        )
        self._start_peak()

    def end_segment(self) -> SegmentBytes:
        """End the segment, and return what it did."""
        start = self._before_segment
        segment = SegmentBytes(
            {part: size - start.live[part] for part, size in self.live_bytes.items()},
            {part: size - start.live[part] for part, size in self.peak_bytes.items()},
            self.peak_activation_bytes - start.live["activations"],
            self.flops - start.flops,
        )
        self._merge_segment(segment)
        return segment

    def replace_segment(self, other: SegmentBytes) -> dict[str, int]:
        """End the segment, and count as if another one had been in its place.

        Return the bytes by part that are counted as alive in addition to those that are.
        """
        start = self._before_segment
        self.flops = start.flops + other.flops
        added = {
            part: start.live[part] + other.change[part] - size
            for part, size in self.live_bytes.items()
        }
        self.add_live_bytes(added)
        self._merge_segment(other)
        return added

    def add_live_bytes(self, sizes: Mapping[str, int]) -> None:
        """Count bytes by part that no storage has; negative ones to take them away."""
        for part, size in sizes.items():
            self.live_bytes[part] += size
            self.total_bytes += size

    def _merge_segment(self, segment: SegmentBytes) -> None:
        start = self._before_segment
        peak = {part: size + segment.peak[part] for part, size in start.live.items()}
        higher = sum(peak.values()) > start.peak_total
        self.peak_bytes = peak if higher else start.peak
        self.peak_total_bytes = sum(self.peak_bytes.values())
        self.peak_activation_bytes = max(
            start.peak_activations, start.live["activations"] + segment.peak_activations
        )

    @contextmanager
    def track_step(self) -> Iterator[None]:
        """Assign parts by the phase inside the context: forward, backward or optimizer."""
        self._stepping = True
        yield
        self._stepping = False

    def mark_forward_start(self) -> None:
        """Call at the start of a micro-batch: a forward pass lasts until autograd runs."""
        self._past_backward = False

    def _part_now(self) -> str:
        if not self._stepping:
            return self.current_part
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
                self._track(each)
        formula = FLOP_FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._tracked:
            return
        size = -(-storage.nbytes() // self._granule) * self._granule
        part = self._part_now()
        self._tracked.add(key)
        self.live_bytes[part] += size
        self.total_bytes += size
        self.peak_activation_bytes = max(self.peak_activation_bytes, self.live_bytes["activations"])
        if self.total_bytes > self.peak_total_bytes:
            self.peak_total_bytes, self.peak_bytes = self.total_bytes, dict(self.live_bytes)
        weakref.finalize(storage, self._untrack, key, part, size).atexit = False

    def _untrack(self, key: int, part: str, size: int) -> None:
        self._tracked.discard(key)
        self.live_bytes[part] -= size
        self.total_bytes -= size
