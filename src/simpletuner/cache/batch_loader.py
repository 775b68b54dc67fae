"""Assemble cached latents and text embeddings into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.cache.target_rules import TargetRules
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
    latents without variance. mask_keys: of every sample, "" without a mask; empty where masks are
    not read. rules: the targets of the samples.
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
    mask_keys: Sequence[str] = ()
    rules: TargetRules = field(default_factory=TargetRules)

    def load(self, micro: MicroBatchPlan) -> Batch:
        """Load a batch. Raises CacheError for a damaged tensor, KeyError for an unknown caption."""
        samples = [self.placed_samples[visit.sample_index].sample for visit in micro.visits]
        visit_keys = tuple(self.visit_key(visit) for visit in micro.visits)
        latents = [
            self._load_latent(visit, key)
            for visit, key in zip(micro.visits, visit_keys, strict=True)
        ]
        captions = [self._caption(visit) for visit in micro.visits]
        datasets = [sample.dataset for sample in samples]
        copies = 1
        # The second half of the batch is the same images with the captions whose output is
        # preserved.
        if self.rules.preserved is not None and self.rules.has_copies(datasets):
            captions += [self.rules.preserved.of(caption) for caption in captions]
            copies = 2
        masks = [self._load_mask(visit) for visit in micro.visits]
        return Batch(
            latents=torch.stack(latents * copies),
            text=TextBatch.stack(
                [load_text_embedding(self.text_store, caption) for caption in captions]
            ),
            sample_ids=tuple(sample.id for sample in samples),
            visit_keys=visit_keys * copies,
            weights=self.rules.weigh(datasets, masks, copies),
            copies=copies,
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

    def _load_mask(self, visit: SampleVisit) -> Tensor | None:
        key = self.mask_keys[visit.sample_index] if self.mask_keys else ""
        return self.latent_store.get(key)["mask"] if key else None

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
        # Addressed by the visit: the same draw on every worker, rank and resumed run.
        generator = torch.Generator().manual_seed(seed_at(self.seed, "posterior", visit_key))
        noise = torch.randn(mean.shape, generator=generator)
        # The same clamp as in diffusers' DiagonalGaussianDistribution.
        return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
