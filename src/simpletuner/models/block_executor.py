"""Execution of a network's blocks: plain, with gradient checkpointing, or with swapped weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.adapters.adapted_linear import LoraLinear
from simpletuner.config.schema import ModelOptions
from simpletuner.models.block_swap import BlockSwap, create_transfer_engine
from simpletuner.models.family import BlockMemoryPolicy, Intercept, Streams
from simpletuner.quantization.quantized_linear import QuantizedLinear


class ResidualBlock(nn.Module):
    """A block whose last products are returned, and added to its streams by the caller.

    Nothing then follows these products inside the block, so that they need not be computed again
    for the backward pass: their outputs do not occur in any gradient.
    """

    def last_linears(self) -> tuple[nn.Module, ...]:
        """Return the linears of the last products, as they are now: adapted, quantized or plain."""
        return ()


class UnusedOutputs:
    """A context in which the last linears of a block do not compute their outputs.

    It is entered when the block is computed again. A plain linear needs no such mark: autograd
    saves its operands before the product, and torch stops there.
    """

    def __init__(self, block: nn.Module) -> None:
        linears = block.last_linears() if isinstance(block, ResidualBlock) else ()
        self._marked = [part for part in linears if isinstance(part, (LoraLinear, QuantizedLinear))]

    def __enter__(self) -> None:
        self._mark(True)

    def __exit__(self, *error: object) -> None:
        self._mark(False)

    def _mark(self, unused: bool) -> None:
        for linear in self._marked:
            linear.output_unused = unused


def block_memory_policy(
    options: ModelOptions, blocks: int, streams_approximator: bool = False
) -> BlockMemoryPolicy:
    """Return the policy that the options describe for a network of so many blocks.

    gradient_checkpointing "auto" means every block here; the memory plan replaces it by a number.
    streams_approximator: whether chroma_approximator_device "auto" moves its weights to the host.
    """
    on_cpu = options.chroma_approximator_device == "cpu"
    streamed = streams_approximator and options.chroma_approximator_device == "auto"
    checkpointing = options.gradient_checkpointing
    share = options.musubi_blocks_to_swap
    swapped = int(share * blocks) if share < 1 else int(share)
    return BlockMemoryPolicy(
        checkpointed=(
            blocks
            if checkpointing in (True, "auto")
            else min(max(int(checkpointing), swapped), blocks)
        ),
        interval=options.gradient_checkpointing_interval or 1,
        swapped=swapped,
        offload_activations=options.gradient_checkpointing_backend == "offload",
        approximator_on_host=on_cpu or streamed,
        approximator_computes_on_host=on_cpu,
    )


@dataclass(frozen=True)
class BlockExecutor:
    """Runs one block as the memory policy says.

    checkpointed: numbers of the blocks with gradient checkpointing. block_swap: brings swapped
    weights to the device. saved_tensors_context: where checkpointed blocks keep their inputs until
    the backward pass. skips_last_products: whether a checkpointed block does not compute its last
    products again; compiled blocks do, because theirs are part of a larger program. intercept: is
    called in place of every block with a function that runs it; the memory plan counts them so.
    """

    checkpointed: frozenset[int] = frozenset()
    block_swap: BlockSwap | None = None
    saved_tensors_context: Callable[[], AbstractContextManager[object]] = nullcontext
    skips_last_products: bool = True
    intercept: Intercept | None = None

    def __call__(self, number: int, block: nn.Module, streams: Streams, *rest: Any) -> Streams:
        """Return block(*streams, *rest) as a tuple.

        streams: the outputs of the previous block. rest: small tensors that all blocks share.
        """
        if self.intercept is None:
            return self._run(number, block, streams, *rest)
        return self.intercept(
            number, block, streams, lambda: self._run(number, block, streams, *rest)
        )

    def _run(self, number: int, block: nn.Module, streams: Streams, *rest: Any) -> Streams:

        def run(*inputs: Tensor) -> Streams:
            outputs = block(*inputs, *rest)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        compute: Callable[..., Streams] = run
        if torch.is_grad_enabled() and number in self.checkpointed:
            compute = partial(self._run_checkpointed, block, run)
        if self.block_swap is None or number not in self.block_swap:
            return compute(*streams)
        with self.block_swap.on_device(number):
            outputs = compute(*streams)
        return self.block_swap.mark_backward_start(number, outputs)

    def _run_checkpointed(
        self, block: nn.Module, run: Callable[..., Streams], *streams: Tensor
    ) -> Streams:
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            again = UnusedOutputs(block) if self.skips_last_products else nullcontext()
            return nullcontext(), again

        with self.saved_tensors_context():
            outputs: Streams = checkpoint(
                run,
                *streams,
                use_reentrant=False,
                # To drop the same elements again; asked here, because adapters may come later.
                preserve_rng_state=has_dropout(block),
                context_fn=contexts,
            )
        return outputs


def compile_blocks(
    blocks: Sequence[nn.Module], options: ModelOptions, former: BlockExecutor
) -> BlockExecutor:
    """Compile each block in place, at its first call, for any batch size and sequence length.

    Return the executor of the blocks, given the former one.

    torch compiles separate programs for a block with and without gradient, with and without
    padding, and for the last block.
    """
    backend = options.dynamo_backend
    if not options.compiles_blocks:
        return former
    mode = options.dynamo_mode if backend == "inductor" else None
    for block in blocks:
        block.compile(backend=backend, dynamic=True, mode=mode)
    return replace(former, skips_last_products=False)


def place_blocks(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    memory: BlockMemoryPolicy,
    device: torch.device | None,
    former: BlockExecutor,
    stay: Iterable[nn.Module] = (),
) -> BlockExecutor:
    """Move every tensor to where `memory` wants it and return the executor of the blocks.

    Parameters keep their identity. device: for everything that stays on the device; None moves
    nothing. former: the executor of the previous placement, whose weights are released. stay:
    modules that stay on the CPU. Raises ConfigError when `device` has no memory of its own and
    `memory` would offload to the host.
    """
    if former.block_swap is not None:
        former.block_swap.close()
    checkpointed = frozenset(memory.checkpointed_block_numbers(len(blocks)))
    swapped = memory.swapped_block_numbers(len(blocks))
    engine = create_transfer_engine(device) if swapped or memory.offload_activations else None
    swap = None
    if swapped and engine:
        swap = BlockSwap({number: blocks[number] for number in swapped}, engine)
    if device is not None:
        on_host = {id(part) for module in stay for part in module.modules()}
        _move_tensors(network, device, on_host, swap)
    executor = BlockExecutor(checkpointed, swap)
    if engine and memory.offload_activations:
        return replace(executor, saved_tensors_context=engine.offload_saved_tensors)
    return executor


def has_dropout(block: nn.Module) -> bool:
    """Return whether a block draws random numbers when it is trained."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in block.modules())


def _move_tensors(
    network: nn.Module, device: torch.device, on_host: set[int], swap: BlockSwap | None
) -> None:
    """Move all tensors except swapped ones; on_host: ids of the modules that stay on the CPU."""
    for module in network.modules():
        target = torch.device("cpu") if id(module) in on_host else device
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device.type != target.type and (swap is None or not swap.owns_tensor(tensor)):
                tensor.data = tensor.data.to(target)
