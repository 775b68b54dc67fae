"""The encoders of an architecture: captions to embeddings, pixels to latents and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from simpletuner.cache.batch_types import TextEmbedding


@dataclass(frozen=True)
class EncoderPass:
    """A text encoder or VAE at work, for the memory plan.

    module: on the meta device, in the dtype of the run. run: passes a batch without data through
    the module once its tensors are replaced.
    """

    module: nn.Module
    run: Callable[[], object]


class TextEncoder(ABC):
    """Captions to text embeddings."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> list[TextEmbedding]:
        """Return the named tensors of each caption, on the CPU and in the dtype of the cache.

        Their names and shapes are those of ArchitectureConstants.text_tensors.
        """

    def encode_batches(
        self,
        batches: Sequence[Sequence[str]],
        advance: Callable[[int], None] = lambda captions: None,
    ) -> Iterator[list[TextEmbedding]]:
        """Yield what `encode` returns for each batch of captions, bit for bit, in their order.

        advance: receives how many more captions are done; the work of several batches may be done
        together, before the first of them is yielded.
        """
        for captions in batches:
            embeddings = self.encode(captions)
            advance(len(captions))
            yield embeddings

    @abstractmethod
    def token_count(self, caption: str) -> int:
        """Count the tokens of the whole caption, end token included, before any limit."""


class Vae(ABC):
    """Pixels to raw posterior moments, and latents back to pixels."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H * stride, W * stride) in [-1, 1] to raw moments (B, 2C, H, W).

        The first C channels are the mean, the others the log variance; on the CPU, in the VAE's
        dtype.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, H, W) to pixels (B, 3, H * stride, W * stride) in [-1, 1].

        The result is float32 on the CPU.
        """
