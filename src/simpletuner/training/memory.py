"""How much of a network is kept on the device: from the options to a BlockMemory."""

from __future__ import annotations

from simpletuner.config.schema import ModelOptions
from simpletuner.models.family import BlockMemory


def block_memory(options: ModelOptions, blocks: int, demanded: int | None = None) -> BlockMemory:
    """Of a network of so many blocks.

    demanded: how many must be recomputed for the step to fit, where gradient_checkpointing is "auto"; None
    is all of them.
    """
    asked = options.gradient_checkpointing
    if asked == "auto":
        asked = True if demanded is None else demanded
    share = options.musubi_blocks_to_swap
    swapped = int(share * blocks) if share < 1 else int(share)
    return BlockMemory(
        blocks if asked is True else min(max(int(asked), swapped), blocks),
        options.gradient_checkpointing_interval or 1,
        swapped,
        options.gradient_checkpointing_backend == "offload",
        options.chroma_approximator_device == "cpu",
    )
