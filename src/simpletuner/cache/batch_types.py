"""Batches that the caches provide and the network consumes.

B batch · C latent channels · H W latent side (image px / stride) · L text tokens · D text width

The text of a caption is a bundle of named tensors, for example one of a T5 and one of a CLIP
encoder. A tensor with two dimensions or more, such as (L, D), has the length as its first axis; a
tensor with one dimension (D,) is a pooled vector without a length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

TextEmbedding: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class TextBatch:
    """Text of a batch, one tensor per name.

    tensors: (B, L, D), right-padded with zeros to the longest caption, or (B, D). lengths: number
    of real rows of each sample, for the tensors that have a length axis.
    """

    tensors: Mapping[str, Tensor]
    lengths: Mapping[str, tuple[int, ...]]

    def has_equal_lengths(self, name: str) -> bool:
        """Return whether no sample of this tensor is padded, so that no mask is needed."""
        return all(length == self.tensors[name].shape[1] for length in self.lengths[name])

    def select(self, rows: Sequence[int]) -> TextBatch:
        """Return the text of these samples, padded to the longest caption among them."""
        chosen = list(rows)
        lengths = {
            name: tuple(values[row] for row in chosen) for name, values in self.lengths.items()
        }
        tensors = {
            name: tensor[chosen, : max(lengths[name])] if name in lengths else tensor[chosen]
            for name, tensor in self.tensors.items()
        }
        return TextBatch(tensors, lengths)

    @staticmethod
    def stack(embeddings: Sequence[TextEmbedding]) -> TextBatch:
        """Pad and stack the embeddings of the samples, which have the same names."""
        tensors = {}
        lengths = {}
        for name, first in embeddings[0].items():
            samples = [embedding[name] for embedding in embeddings]
            if first.ndim == 1:
                tensors[name] = torch.stack(samples)
                continue
            lengths[name] = tuple(len(sample) for sample in samples)
            padded = first.new_zeros(len(samples), max(lengths[name]), *first.shape[1:])
            for target, sample in zip(padded, samples, strict=True):
                target[: len(sample)] = sample
            tensors[name] = padded
        return TextBatch(tensors, lengths)

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> TextBatch:
        """Move the tensors to a device, and cast them if a dtype is given.

        non_blocking: do not wait for a copy from pinned memory.
        """
        tensors = {
            name: tensor.to(device=device, dtype=dtype or tensor.dtype, non_blocking=non_blocking)
            for name, tensor in self.tensors.items()
        }
        return TextBatch(tensors, self.lengths)

    def pin_memory(self) -> TextBatch:
        """Return the same in page-locked memory, from which a GPU copies without the host."""
        tensors = {name: tensor.pin_memory() for name, tensor in self.tensors.items()}
        return TextBatch(tensors, self.lengths)


@dataclass(frozen=True)
class TargetWeights:
    """Weights of the two targets in every cell of every row.

    data: the weight of the target from the image and its noise. base: that of the base's own
    prediction. Both are (R, 1, H, W), or (R, 1, 1, 1) where no row has a mask, float32 on the CPU;
    the loss of a row is the mean over its elements of weight times error. base_rows: the rows with
    a base weight, ascending.
    """

    data: Tensor
    base: Tensor
    base_rows: tuple[int, ...]

    def to(self, device: torch.device | str) -> TargetWeights:
        """Copy the weights to a device without waiting."""
        data, base = (part.to(device, non_blocking=True) for part in (self.data, self.base))
        return TargetWeights(data, base, self.base_rows)

    def pin_memory(self) -> TargetWeights:
        """Return the same in page-locked memory, from which a GPU copies without the host."""
        return TargetWeights(self.data.pin_memory(), self.base.pin_memory(), self.base_rows)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples in R = B * copies rows: all samples once, then once more.

    latents: (R, C, H, W) float32, scaled for the transformer. text: of every row; copies have other
    captions. sample_ids: one per sample. visit_keys: one per row. A visit key is unique per
    appearance ("<sample id>@<epoch>.<pass>"); the noise of the visit is derived from it, so copies
    have the same. noise: of the target and of the network's input, each of the shape of the
    latents, where it is drawn ahead; they may be one tensor. weights: None where every row is
    trained on its image with the weight 1.
    """

    latents: Tensor
    text: TextBatch
    sample_ids: tuple[str, ...]
    visit_keys: tuple[str, ...]
    noise: tuple[Tensor, Tensor] | None = None
    weights: TargetWeights | None = None
    copies: int = 1

    def pin_memory(self) -> Batch:
        """Return the same in page-locked memory, from which a GPU copies without the host."""
        noise = None
        if self.noise is not None:
            target, network_input = self.noise
            pinned = target.pin_memory()
            noise = pinned, pinned if network_input is target else network_input.pin_memory()
        return replace(
            self,
            latents=self.latents.pin_memory(),
            text=self.text.pin_memory(),
            noise=noise,
            weights=None if self.weights is None else self.weights.pin_memory(),
        )
