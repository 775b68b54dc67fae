"""How the blocks of a network are run: kept, recomputed in the backward pass, or fetched for each pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.config.schema import ModelOptions
from simpletuner.models.family import BlockMemory
from simpletuner.models.swap import Swap, lane_for

Streams = tuple[Tensor, ...]


def block_memory(options: ModelOptions, blocks: int) -> BlockMemory:
    """What the options ask for, of so many blocks. The plan gives "auto" a number; without one it is all."""
    asked = options.gradient_checkpointing
    share = options.musubi_blocks_to_swap
    swapped = int(share * blocks) if share < 1 else int(share)
    return BlockMemory(
        blocks if asked in (True, "auto") else min(max(int(asked), swapped), blocks),
        options.gradient_checkpointing_interval or 1,
        swapped,
        options.gradient_checkpointing_backend == "offload",
        options.chroma_approximator_device == "cpu",
    )


@dataclass(frozen=True)
class Runner:
    """recomputed: numbers of the blocks that keep only their inputs. swap: holds weights that are elsewhere.

    inputs: where recomputed blocks put their inputs until the backward pass.
    """

    recomputed: frozenset[int] = frozenset()
    swap: Swap | None = None
    inputs: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self, number: int, block: nn.Module, streams: Streams, *rest: Any) -> Streams:
        """block(*streams, *rest). streams: what the block before handed on; all else is small and shared."""

        def run(*given: Tensor) -> Streams:
            out = block(*given, *rest)
            return out if isinstance(out, tuple) else (out,)

        again = torch.is_grad_enabled() and number in self.recomputed
        if self.swap is None or number not in self.swap:
            return self._recomputed(run, streams) if again else run(*streams)
        with self.swap.present(number):
            out = self._recomputed(run, streams) if again else run(*streams)
        return self.swap.after(number, out)

    def _recomputed(self, run: Callable[..., Streams], streams: Streams) -> Streams:
        with self.inputs():
            # The generator's state is kept: adapters with dropout must drop the same again.
            out: Streams = checkpoint(run, *streams, use_reentrant=False, preserve_rng_state=True)
        return out


def compile_each(blocks: Sequence[nn.Module], options: ModelOptions) -> None:
    """One program per kind of block, for any batch, size and text length; in place, at the first call.

    A program exists per way of running as well: with and without gradient, masked and not, the last block.
    """
    backend = options.dynamo_backend
    if backend == "no":
        return
    mode = options.dynamo_mode if backend == "inductor" else None
    for block in blocks:
        block.compile(backend=backend, dynamic=True, mode=mode)


def arrange(
    network: nn.Module, blocks: Sequence[nn.Module], memory: BlockMemory, device: torch.device | None,
    former: Runner, stay: Iterable[nn.Module] = (),
) -> Runner:  # fmt: skip
    """The runner of a BlockMemory, and every tensor where it wants it; parameters keep their identity.

    stay: modules for the CPU. device: of all else, None to move nothing. ConfigError where its memory is the
    host's and `memory` would have something wait there.
    """
    if former.swap is not None:
        former.swap.close()
    recomputed, fetched = memory.recomputed(len(blocks)), memory.fetched(len(blocks))
    lane = lane_for(device) if fetched or memory.offload_activations else None
    swap = Swap({number: blocks[number] for number in fetched}, lane) if fetched and lane else None
    if device is not None:
        _place(network, device, {id(part) for module in stay for part in module.modules()}, swap)
    if lane and memory.offload_activations:
        return Runner(frozenset(recomputed), swap, lane.inputs_on_host)
    return Runner(frozenset(recomputed), swap)


def _place(network: nn.Module, device: torch.device, on_host: set[int], swap: Swap | None) -> None:
    """on_host: ids of the modules that stay on the CPU."""
    for module in network.modules():
        at = torch.device("cpu") if id(module) in on_host else device
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device.type != at.type and (swap is None or not swap.holds(tensor)):
                tensor.data = tensor.data.to(at)
