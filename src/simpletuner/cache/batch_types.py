"""Batches that the caches provide and the network consumes.

B batch · C latent channels · H W latent side (image px / stride) · L text tokens · D text width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextBatch:
    """Text of a batch, right-padded to the longest caption.

    embeddings: (B, L, D). lengths: number of real rows of each sample. No attention mask is needed
    when all lengths equal L.
    """

    embeddings: Tensor
    lengths: tuple[int, ...]

    @property
    def has_equal_lengths(self) -> bool:
        """True if no sample is padded."""
        return all(length == self.embeddings.shape[1] for length in self.lengths)

    @staticmethod
    def stack(rows: Sequence[Tensor]) -> TextBatch:
        """Pad and stack one (L_i, D) tensor per sample."""
        lengths = tuple(len(row) for row in rows)
        padded = rows[0].new_zeros(len(rows), max(lengths), rows[0].shape[1])
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return TextBatch(padded, lengths)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> TextBatch:
        return TextBatch(self.embeddings.to(device=device, dtype=dtype), self.lengths)


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    latents: (B, C, H, W) float32, scaled for the transformer. sample_ids, visit_keys: one per
    sample. A visit key is unique per appearance ("<sample id>@<epoch>.<pass>"); the noise of the
    visit is derived from it.
    """

    latents: Tensor
    text: TextBatch
    sample_ids: tuple[str, ...]
    visit_keys: tuple[str, ...]
