"""From the caches to what the network eats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.cache.text_cache import load_text_embeddings
from simpletuner.data.sample_types import BucketedSample, MicroBatch, SampleVisit
from simpletuner.randomness import seed_at


@dataclass(frozen=True)
class BatchLoader:
    """load() is pure in the micro-batch and may be called from any thread.

    placed, keys: as `latents.fill` returns them. shift, scale: the network sees (z - shift) * scale.
    sample: "draw" takes a fresh point of the posterior at each visit, "mean" always its mean.
    """

    placed_samples: Sequence[BucketedSample]
    latent_keys: Sequence[str]
    latent_store: TensorStore
    text_store: TensorStore
    latent_shift: float
    latent_scale: float
    posterior_mode: Literal["mean", "draw"]
    seed: int

    def load(self, micro: MicroBatch) -> Batch:
        """CacheError when a stored tensor is damaged; KeyError when a caption was never encoded."""
        visit_keys = tuple(self.visit_key(visit) for visit in micro.visits)
        latents = [
            self._load_latent(visit, key)
            for visit, key in zip(micro.visits, visit_keys, strict=True)
        ]
        return Batch(
            latents=torch.stack(latents),
            text=TextBatch.stack(
                [
                    load_text_embeddings(self.text_store, self._caption(visit))
                    for visit in micro.visits
                ]
            ),
            sample_ids=tuple(
                self.placed_samples[visit.sample_index].sample.id for visit in micro.visits
            ),
            visit_keys=visit_keys,
        )

    def visit_key(self, visit: SampleVisit) -> str:
        return f"{self.placed_samples[visit.sample_index].sample.id}@{visit.round_index}.{visit.repeat_index}"

    def _caption(self, visit: SampleVisit) -> str:
        return (
            ""
            if visit.caption_index is None
            else self.placed_samples[visit.sample_index].sample.captions[visit.caption_index]
        )

    def _load_latent(self, visit: SampleVisit, visit_key: str) -> Tensor:
        moments = self.latent_store.get(self.latent_keys[visit.sample_index])["moments"]
        return (self._sample_posterior(moments, visit_key) - self.latent_shift) * self.latent_scale

    def _sample_posterior(self, moments: Tensor, visit_key: str) -> Tensor:
        mean, log_variance = moments.to(torch.float32).chunk(2)
        if self.posterior_mode == "mean":
            return mean
        generator = torch.Generator().manual_seed(seed_at(self.seed, "posterior", visit_key))
        noise = torch.randn(mean.shape, generator=generator)
        # The clamp is the autoencoder's own (diffusers' DiagonalGaussianDistribution).
        return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
