"""Assemble cached latents and text embeddings into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.cache.text_cache import load_text_embedding
from simpletuner.data.sample_types import BucketedSample, MicroBatchPlan, SampleVisit
from simpletuner.randomness import seed_at


@dataclass(frozen=True)
class BatchLoader:
    """Loads batches; load() depends only on the micro-batch and may be called from any thread.

    placed_samples, latent_keys: as encode_missing_latents returns them. latent_shift, latent_scale:
    the network gets (latent - shift) * scale. posterior_mode: "draw" samples the posterior at each
    visit, "mean" always takes its mean. latent_channels: moments with exactly as many channels are
    latents without variance.
    """

    placed_samples: Sequence[BucketedSample]
    latent_keys: Sequence[str]
    latent_store: TensorStore
    text_store: TensorStore
    latent_shift: float
    latent_scale: float
    posterior_mode: Literal["mean", "draw"]
    seed: int
    latent_channels: int

    def load(self, micro: MicroBatchPlan) -> Batch:
        """Load a batch. Raises CacheError for a damaged tensor, KeyError for an unknown caption."""
        visit_keys = tuple(self.visit_key(visit) for visit in micro.visits)
        latents = [
            self._load_latent(visit, key)
            for visit, key in zip(micro.visits, visit_keys, strict=True)
        ]
        return Batch(
            latents=torch.stack(latents),
            text=TextBatch.stack(
                [
                    load_text_embedding(self.text_store, self._caption(visit))
                    for visit in micro.visits
                ]
            ),
            sample_ids=tuple(
                self.placed_samples[visit.sample_index].sample.id for visit in micro.visits
            ),
            visit_keys=visit_keys,
        )

    def visit_key(self, visit: SampleVisit) -> str:
        """Return "<sample id>@<epoch>.<pass>", unique for each visit of a sample."""
        sample_id = self.placed_samples[visit.sample_index].sample.id
        return f"{sample_id}@{visit.round_index}.{visit.repeat_index}"

    def _caption(self, visit: SampleVisit) -> str:
        return (
            ""
            if visit.caption_index is None
            else self.placed_samples[visit.sample_index].sample.captions[visit.caption_index]
        )

    def _load_latent(self, visit: SampleVisit, visit_key: str) -> Tensor:
        moments = self.latent_store.get(self.latent_keys[visit.sample_index])["moments"]
        if len(moments) == self.latent_channels:  # without variances, as from pixels without a VAE
            latent = moments.to(torch.float32)
        else:
            latent = self._sample_posterior(moments, visit_key)
        return (latent - self.latent_shift) * self.latent_scale

    def _sample_posterior(self, moments: Tensor, visit_key: str) -> Tensor:
        mean, log_variance = moments.to(torch.float32).chunk(2)
        if self.posterior_mode == "mean":
            return mean
        generator = torch.Generator().manual_seed(seed_at(self.seed, "posterior", visit_key))
        noise = torch.randn(mean.shape, generator=generator)
        # The same clamp as in diffusers' DiagonalGaussianDistribution.
        return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
