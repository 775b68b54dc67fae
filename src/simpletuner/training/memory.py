"""How much of a network is kept on the device: from the options to a BlockMemory."""

from __future__ import annotations

from simpletuner.config.schema import ModelOptions
from simpletuner.models.family import BlockMemory


def block_memory(options: ModelOptions, blocks: int) -> BlockMemory:
    """Of a network of so many blocks. The plan puts a number in the place of "auto"; without, it is all."""
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
