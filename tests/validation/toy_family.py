"""A family whose sampling is known in closed form, so that the solver path has an exact answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simpletuner.cache.batch_types import Batch, TextBatch, TextEmbedding
from simpletuner.models.family import ArchitectureConstants, ModelFamily, TextTensor
from simpletuner.validation.inference import Inference

FACTS = ArchitectureConstants(
    latent_channels=4,
    stride_px=8,
    alignment_px=16,
    token_px=16,
    max_tokens=16,
    text_tensors={"t5": TextTensor(4)},
    latent_shift=0.0,
    latent_scale=1.0,
)


class ToyNetwork(nn.Module):
    """v = gain x + word, the word being the mean of a text's real rows, a number per channel."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.dropout = nn.Dropout(0.9)
        self.calls: list[int] = []
        self.grad_seen = False

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        self.calls.append(len(x))
        self.grad_seen |= torch.is_grad_enabled()
        return self.dropout(self.gain * x + words[:, :, None, None])


def mean_embedding(embedding: TextEmbedding) -> Tensor:
    return embedding["t5"].float().mean(dim=0)


def embed_text(text: str) -> dict[str, Tensor]:
    """(L, 4) in bfloat16; the length follows the text's."""
    generator = torch.Generator().manual_seed(sum(map(ord, text)))
    return {"t5": torch.randn(1 + len(text) % 5, 4, generator=generator).bfloat16()}


def exact_euler_result(noise: Tensor, gain: float, word: Tensor, steps: int) -> Tensor:
    """Euler's result for v = gain x + word in closed form: x shrinks by r = 1 - gain / steps each
    time.
    """
    left = (1 - gain / steps) ** steps
    return left * noise - (1 - left) / gain * word[:, None, None]


def decode(latents: Tensor) -> Tensor:
    """A VAE of sorts: the first three channels, eight pixels wide."""
    return latents[:, :3].tanh().repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


class ToyFamily(ModelFamily):
    """Only what sampling asks of a family; the rest of the contract is never called."""

    def predict_velocity(
        self, transformer: nn.Module, x_sigma: Tensor, sigma: Tensor, text: TextBatch
    ) -> Tensor:
        words = [
            mean_embedding({"t5": rows[:length]})
            for rows, length in zip(text.tensors["t5"], text.lengths["t5"], strict=True)
        ]
        velocity: Tensor = transformer(x_sigma, torch.stack(words))
        return velocity


ToyFamily.__abstractmethods__ = frozenset()

INFERENCE = Inference(ToyFamily(), FACTS, torch.device("cpu"), torch.float32)


def make_batch(ids: Sequence[str]) -> Batch:
    """Latents and text that depend on the sample alone."""
    latents = [
        torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(sum(map(ord, one))))
        for one in ids
    ]
    return Batch(
        torch.stack(latents),
        TextBatch.stack([embed_text(one) for one in ids]),
        tuple(ids),
        tuple(ids),
    )
