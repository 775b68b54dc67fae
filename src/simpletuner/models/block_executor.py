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
from simpletuner.models.block_swap import BlockSwap, create_transfer_engine
from simpletuner.models.family import BlockMemoryPolicy

Streams = tuple[Tensor, ...]


def block_memory_policy(options: ModelOptions, blocks: int) -> BlockMemoryPolicy:
    """What the options ask for, of so many blocks. The plan gives "auto" a number; without one it is all."""
    asked = options.gradient_checkpointing
    share = options.musubi_blocks_to_swap
    swapped = int(share * blocks) if share < 1 else int(share)
    return BlockMemoryPolicy(
        blocks if asked in (True, "auto") else min(max(int(asked), swapped), blocks),
        options.gradient_checkpointing_interval or 1,
        swapped,
        options.gradient_checkpointing_backend == "offload",
        options.chroma_approximator_device == "cpu",
    )


@dataclass(frozen=True)
class BlockExecutor:
    """recomputed: numbers of the blocks that keep only their inputs. swap: holds weights that are elsewhere.

    inputs: where recomputed blocks put their inputs until the backward pass.
    """

    checkpointed: frozenset[int] = frozenset()
    block_swap: BlockSwap | None = None
    saved_tensors_context: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self, number: int, block: nn.Module, streams: Streams, *rest: Any) -> Streams:
        """block(*streams, *rest). streams: what the block before handed on; all else is small and shared."""

        def run(*given: Tensor) -> Streams:
            out = block(*given, *rest)
            return out if isinstance(out, tuple) else (out,)

        again = torch.is_grad_enabled() and number in self.checkpointed
        if self.block_swap is None or number not in self.block_swap:
            return self._run_checkpointed(run, streams) if again else run(*streams)
        with self.block_swap.on_device(number):
            out = self._run_checkpointed(run, streams) if again else run(*streams)
        return self.block_swap.mark_backward_start(number, out)

    def _run_checkpointed(self, run: Callable[..., Streams], streams: Streams) -> Streams:
        with self.saved_tensors_context():
            # The generator's state is kept: adapters with dropout must drop the same again.
            out: Streams = checkpoint(run, *streams, use_reentrant=False, preserve_rng_state=True)
        return out


def compile_blocks(blocks: Sequence[nn.Module], options: ModelOptions) -> None:
    """One program per kind of block, for any batch, size and text length; in place, at the first call.

    A program exists per way of running as well: with and without gradient, masked and not, the last block.
    """
    backend = options.dynamo_backend
    if backend == "no":
        return
    mode = options.dynamo_mode if backend == "inductor" else None
    for block in blocks:
        block.compile(backend=backend, dynamic=True, mode=mode)


def place_blocks(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    memory: BlockMemoryPolicy,
    device: torch.device | None,
    former: BlockExecutor,
    stay: Iterable[nn.Module] = (),
) -> BlockExecutor:
    """The runner of a BlockMemory, and every tensor where it wants it; parameters keep their identity.

    stay: modules for the CPU. device: of all else, None to move nothing. ConfigError where its memory is the
    host's and `memory` would have something wait there.
    """
    if former.block_swap is not None:
        former.block_swap.close()
    recomputed, fetched = (
        memory.checkpointed_block_numbers(len(blocks)),
        memory.swapped_block_numbers(len(blocks)),
    )
    lane = create_transfer_engine(device) if fetched or memory.offload_activations else None
    swap = (
        BlockSwap({number: blocks[number] for number in fetched}, lane)
        if fetched and lane
        else None
    )
    if device is not None:
        _move_tensors(
            network, device, {id(part) for module in stay for part in module.modules()}, swap
        )
    if lane and memory.offload_activations:
        return BlockExecutor(frozenset(recomputed), swap, lane.offload_saved_tensors)
    return BlockExecutor(frozenset(recomputed), swap)


def _move_tensors(
    network: nn.Module, device: torch.device, on_host: set[int], swap: BlockSwap | None
) -> None:
    """on_host: ids of the modules that stay on the CPU."""
    for module in network.modules():
        at = torch.device("cpu") if id(module) in on_host else device
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device.type != at.type and (swap is None or not swap.owns_tensor(tensor)):
                tensor.data = tensor.data.to(at)
