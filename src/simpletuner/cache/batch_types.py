"""What the caches hand to the network.

B batch · C latent channels · H W latent side (image px / stride) · L text tokens · D text width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextBatch:
    """Text of a batch, right-padded to the longest.

    rows: (B, L, D). lengths: for each sample how many of the L rows are real (its tokens + the one pad).
    All lengths equal L: no mask exists anywhere.
    """

    embeddings: Tensor
    lengths: tuple[int, ...]

    @property
    def has_equal_lengths(self) -> bool:
        return all(length == self.embeddings.shape[1] for length in self.lengths)

    @staticmethod
    def stack(rows: Sequence[Tensor]) -> TextBatch:
        """rows: one (L_i, D) per sample."""
        lengths = tuple(len(row) for row in rows)
        padded = rows[0].new_zeros(len(rows), max(lengths), rows[0].shape[1])
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return TextBatch(padded, lengths)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> TextBatch:
        return TextBatch(self.embeddings.to(device=device, dtype=dtype), self.lengths)


@dataclass(frozen=True)
class Batch:
    """latents: (B, C, H, W) float32, scaled for the transformer. sample_ids, visit_keys: one per sample;
    a visit key is unique per appearance ("<sample id>@<epoch>.<pass>") and addresses the visit's noise.
    """

    latents: Tensor
    text: TextBatch
    sample_ids: tuple[str, ...]
    visit_keys: tuple[str, ...]
