"""From the caches to what the network eats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from simpletuner.cache.store import Store
from simpletuner.cache.text import rows_of
from simpletuner.cache.types import Batch, TextBatch
from simpletuner.data.types import MicroBatch, Placed, Visit
from simpletuner.randomness import seed_at


@dataclass(frozen=True)
class Batches:
    """load() is pure in the micro-batch and may be called from any thread.

    placed, keys: as `latents.fill` returns them. shift, scale: the network sees (z - shift) * scale.
    sample: "draw" takes a fresh point of the posterior at each visit, "mean" always its mean.
    """

    placed: Sequence[Placed]
    keys: Sequence[str]
    latents: Store
    text: Store
    shift: float
    scale: float
    sample: Literal["mean", "draw"]
    seed: int

    def load(self, micro: MicroBatch) -> Batch:
        """CacheError when a stored tensor is damaged; KeyError when a caption was never encoded."""
        visit_keys = tuple(self.visit_key(visit) for visit in micro.visits)
        latents = [self._latent(visit, key) for visit, key in zip(micro.visits, visit_keys, strict=True)]
        return Batch(
            latents=torch.stack(latents),
            text=TextBatch.stack([rows_of(self.text, self._caption(visit)) for visit in micro.visits]),
            sample_ids=tuple(self.placed[visit.index].sample.id for visit in micro.visits),
            visit_keys=visit_keys,
        )

    def visit_key(self, visit: Visit) -> str:
        return f"{self.placed[visit.index].sample.id}@{visit.epoch}.{visit.pass_}"

    def _caption(self, visit: Visit) -> str:
        return "" if visit.caption is None else self.placed[visit.index].sample.captions[visit.caption]

    def _latent(self, visit: Visit, visit_key: str) -> Tensor:
        moments = self.latents.get(self.keys[visit.index])["moments"]
        return (self._posterior(moments, visit_key) - self.shift) * self.scale

    def _posterior(self, moments: Tensor, visit_key: str) -> Tensor:
        mean, log_variance = moments.to(torch.float32).chunk(2)
        if self.sample == "mean":
            return mean
        generator = torch.Generator().manual_seed(seed_at(self.seed, "posterior", visit_key))
        noise = torch.randn(mean.shape, generator=generator)
        # The clamp is the autoencoder's own (diffusers' DiagonalGaussianDistribution).
        return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
