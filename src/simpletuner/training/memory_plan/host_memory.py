"""Host memory of a training: the parts that are there instead of on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from simpletuner.config.schema import RunConfig
from simpletuner.models.block_swap import DEVICE_BUFFERS
from simpletuner.models.family import BlockMemoryPolicy, ModelSpec
from simpletuner.training.ema import resolve_ema_device
from simpletuner.training.memory_plan.fake_step import BatchShape, StepMeasurement
from simpletuner.training.optimizers import is_state_offloaded

# Python, torch and its libraries: not counted, but observed in such programs.
HOST_RUNTIME_BYTES = {"cuda": 2_500_000_000, "mps": 1_000_000_000, "cpu": 800_000_000}
# Bytes of a number in a block's input: only GPUs offload it, and they compute in bf16.
ACTIVATION_ITEM_BYTES = 2


def offloaded_bytes(
    run: RunConfig,
    kind: str,
    spec: ModelSpec,
    memory: BlockMemoryPolicy,
    feed: BatchShape,
    measured: StepMeasurement,
    average: int,
) -> dict[str, int]:
    """Return the bytes that are in host memory during training, by use; 0 for what is not."""
    on_host = dict.fromkeys(("swapped blocks", "inputs", "approximator", "optimizer", "average"), 0)
    if memory.offload_activations:
        on_host["inputs"] = checkpointed_input_bytes(spec, memory, feed)
    if memory.approximator_on_host:
        on_host["approximator"] = spec.cpu_offloadable_bytes
    if is_state_offloaded(run.optimizer, torch.device(kind)):
        on_host["optimizer"] = measured.optimizer
    ema_device = resolve_ema_device(run.optimizer, run.model.model_type == "lora")
    if kind != "cpu" and ema_device == "cpu":
        on_host["average"] = average
    return on_host


def checkpointed_input_bytes(
    spec: ModelSpec, memory: BlockMemoryPolicy, feed: BatchShape, page_locked: bool = False
) -> int:
    """Return the bytes of the inputs of checkpointed blocks, except those of the last two.

    An input has the rows of text and image. page_locked: in torch's page-locked memory, where the
    bytes of each are rounded up to a power of two.
    """
    tokens = feed.size_px[0] * feed.size_px[1] // spec.constants.token_px**2 + feed.text_rows
    block_bytes = feed.samples * feed.copies * tokens * spec.width * ACTIVATION_ITEM_BYTES
    if page_locked:
        block_bytes = 1 << (block_bytes - 1).bit_length()
    blocks = len(memory.checkpointed_block_numbers(len(spec.blocks)))
    return block_bytes * max(0, blocks - DEVICE_BUFFERS)


def host_memory_by_use(
    kind: str, offloaded: dict[str, int], before: dict[str, int], tensors: int, processes: int
) -> dict[str, int]:
    """Return the host memory by use, of all processes of one machine.

    On a CPU it is the training itself. Else it is what is offloaded, and at first the text encoder.
    """
    uses = {"Python and libraries": HOST_RUNTIME_BYTES[kind]}
    if kind == "cpu":
        uses["training"] = max(tensors, *before.values())
    else:
        uses |= {use: size for use, size in offloaded.items() if size}
        uses["loading"] = max(0, before["text encoder"] - sum(offloaded.values()))
    return {use: size * processes for use, size in uses.items()}


def page_locked_bytes(
    spec: ModelSpec,
    memory: BlockMemoryPolicy,
    feed: BatchShape,
    swapped: Sequence[int],
    model_bytes: int,
) -> dict[str, int]:
    """Return what swapped blocks and offloaded inputs take as they are allocated.

    swapped: bytes of each swapped block. model_bytes: of the transformer, which is loaded whole.
    """
    allocated = {"swapped blocks": max(model_bytes, sum(swapped)) if swapped else 0}
    if memory.offload_activations:
        allocated["inputs"] = checkpointed_input_bytes(spec, memory, feed, page_locked=True)
    return allocated
