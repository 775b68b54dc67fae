"""The scores of attention, which devices without a flash kernel keep as whole matrices.

The plan runs a step on tensors without data, where attention is a flash kernel, as on CUDA and on
the CPU. On MPS, and on AMD GPUs where torch has none, each head of a block makes the matrix of all
scores of its rows, and autograd keeps it for the backward pass.
"""

from __future__ import annotations

import torch

from simpletuner.models.family import BlockMemoryPolicy, ModelSpec
from simpletuner.training.memory_plan.fake_step import BatchShape

SCORE_BYTES = 2  # such devices compute in bf16
# Of the block that runs: scores, their softmax and its gradient.
MATRICES_AT_ONCE = 3


def attention_scores_bytes(
    spec: ModelSpec, feed: BatchShape, memory: BlockMemoryPolicy, kind: str
) -> int:
    """Return the bytes of attention scores in a step; 0 on devices with a flash kernel.

    The estimate is from the sizes of the matrices; it was not measured on such a device.
    """
    if not keeps_scores(kind):
        return 0
    width, height = feed.size_px
    rows = width * height // spec.constants.token_px**2 + feed.text_rows
    matrix = feed.samples * feed.copies * spec.heads * rows**2 * SCORE_BYTES
    plain_blocks = len(spec.blocks) - len(memory.checkpointed_block_numbers(len(spec.blocks)))
    return matrix * (plain_blocks + MATRICES_AT_ONCE)


def keeps_scores(kind: str) -> bool:
    """Return whether attention on a device of this kind makes whole matrices of scores."""
    if kind == "cuda" and torch.version.hip is not None:
        return not torch.backends.cuda.is_flash_attention_available()
    return kind == "mps"
