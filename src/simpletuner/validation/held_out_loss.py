"""Held-out loss: the same samples, sigmas and noise at every step, so that only the weights differ.

B batch · C latent channels · H W latent side (image px / stride)
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.cache.batch_types import Batch
from simpletuner.data.sample_types import BucketedSample, MicroBatch, SampleVisit
from simpletuner.events.event_types import Emit, LossEvaluated
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.flow.objective import add_noise, velocity_target
from simpletuner.randomness import seed_at
from simpletuner.validation.inference import Inference, eval_mode


@dataclass(frozen=True)
class HeldOutSet:
    """Samples that are measured together.

    split: "eval" decides which step is best; "train" is a frozen part of what is trained on, and the
    distance between the two is overfitting. dataset: what a person calls it. samples: how many.
    load: the batches afresh, with posterior-mean latents and the first caption.
    """

    split: str
    dataset: str
    sample_count: int
    load_batches: Callable[[], Iterable[Batch]]


def choose_samples(placed: Sequence[BucketedSample], count: int, seed: int) -> list[int]:
    """Indices of `count` samples picked by a hash of their id: adding data moves few of them."""
    ranked = sorted(
        range(len(placed)), key=lambda index: seed_at(seed, "heldout", placed[index].sample.id)
    )
    return sorted(ranked[:count])


def fixed_batches(
    placed: Sequence[BucketedSample], indices: Sequence[int], batch_size: int
) -> list[MicroBatch]:
    """The samples by bucket, each with its first caption."""
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in indices:
        buckets[placed[index].bucket_px].append(index)
    groups = [
        members[start : start + batch_size]
        for members in buckets.values()
        for start in range(0, len(members), batch_size)
    ]
    visits = [tuple(SampleVisit(index, 0, 0, 0) for index in group) for group in groups]
    return [MicroBatch(number, 0, group) for number, group in enumerate(visits)]


def sigma_midpoints(count: int) -> list[float]:
    """Equidistant sigmas (i + 1/2) / count."""
    return [(index + 0.5) / count for index in range(count)]


def fixed_noise(seed: int, sample_id: str, index: int, shape: torch.Size) -> Tensor:
    """(C, H, W) noise of one sample at its index-th sigma, drawn on the CPU on every device."""
    generator = torch.Generator().manual_seed(seed_at(seed, "heldout-noise", sample_id, index))
    return torch.randn(shape, generator=generator)


def paired_change(
    losses: Mapping[str, float], baseline: Mapping[str, float]
) -> tuple[float, float]:
    """(mean, standard error) of loss - baseline over the samples in both.

    The spread between easy and hard pictures cancels in the pairs. A single pair has no standard error;
    0 is given for it.
    """
    differences = [loss - baseline[sample] for sample, loss in losses.items() if sample in baseline]
    if not differences:
        return 0.0, 0.0
    error = (
        statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    )
    return statistics.fmean(differences), error


class HeldOutEvaluator:
    """Measures sets of samples; remembers their losses at the first measurement and the best step.

    The loss is the plain mean squared error of the velocity, whatever loss trains, so that runs compare.
    """

    def __init__(
        self, inference: Inference, sets: Sequence[HeldOutSet], sigma_count: int, seed: int
    ) -> None:
        self.inference = inference
        self.sets = tuple(sets)
        self.sigmas = sigma_midpoints(sigma_count)
        self.seed = seed
        self.best_step: int | None = None
        self.best_loss = math.inf
        self.last_step: int | None = None
        self._baseline: dict[str, dict[str, float]] = {}
        self._best_step_samples: list[str] = []

    def evaluate(self, transformer: nn.Module, step: int, emit: Emit) -> bool:
        """Measure every set and tell; True when the eval loss is the lowest so far."""
        measured = [(one, self._measure(transformer, one, emit)) for one in self.sets]
        held_out = {
            sample: statistics.fmean(samples[sample])
            for one, samples in measured
            if one.split == "eval"
            for sample in sorted(samples)
        }
        loss, among = statistics.fmean(held_out.values()) if held_out else math.inf, list(held_out)
        if self._best_step_samples not in ([], among):
            self.best_step, self.best_loss = None, math.inf  # it was chosen on other pictures
        best = loss < self.best_loss
        self._best_step_samples, self.last_step = among, step
        if best:
            self.best_step, self.best_loss = step, loss
        for one, samples in measured:
            if samples:
                emit(self._summary(one, samples, step, best and one.split == "eval"))
        return best

    def state_dict(self) -> dict[str, object]:
        """JSON-able: what a resumed run needs to go on comparing with step 0."""
        loss = self.best_loss if math.isfinite(self.best_loss) else None
        return {
            "baseline": self._baseline,
            "best_step": self.best_step,
            "best_loss": loss,
            "last_step": self.last_step,
            "among": self._best_step_samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._baseline, self.best_step = state["baseline"], state["best_step"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.last_step, self._best_step_samples = state.get("last_step"), state.get("among", [])

    def _summary(
        self, one: HeldOutSet, samples: Mapping[str, list[float]], step: int, best: bool
    ) -> LossEvaluated:
        means = {sample: statistics.fmean(losses) for sample, losses in samples.items()}
        baseline = self._baseline.setdefault(f"{one.split}/{one.dataset}", means)
        by_sigma = zip(
            self.sigmas, map(statistics.fmean, zip(*samples.values(), strict=True)), strict=True
        )
        loss = statistics.fmean(means.values())
        return LossEvaluated(
            step,
            one.dataset,
            one.split,
            loss,
            *paired_change(means, baseline),
            tuple(by_sigma),
            best,
        )

    def _measure(
        self, transformer: nn.Module, one: HeldOutSet, emit: Emit
    ) -> dict[str, list[float]]:
        """Loss by sample id, one number per sigma; a sample's numbers don't depend on its batch."""
        losses: dict[str, list[float]] = {}
        with (
            eval_mode(transformer),
            StageReporter(emit, f"evaluate {one.split}", one.sample_count, "samples") as stage,
        ):
            for batch in one.load_batches():
                columns = [
                    self._losses(transformer, batch, index) for index in range(len(self.sigmas))
                ]
                for sample, row in zip(
                    batch.sample_ids, torch.stack(columns, dim=1).tolist(), strict=True
                ):
                    losses[sample] = row
                stage.advance(len(batch.sample_ids))
        return losses

    def _losses(self, transformer: nn.Module, batch: Batch, index: int) -> Tensor:
        """(B,) float64 at the index-th sigma."""
        device = self.inference.device
        latents = batch.latents.to(device)
        noise = torch.stack(
            [
                fixed_noise(self.seed, sample, index, latents.shape[1:])
                for sample in batch.sample_ids
            ]
        ).to(device)
        sigma = torch.full((len(latents),), self.sigmas[index], device=device)
        text = batch.text.to(device, self.inference.text_dtype)
        predicted = self.inference.predict_velocity(
            transformer, add_noise(latents, noise, sigma), sigma, text
        )
        error = predicted - velocity_target(latents, noise)
        return error.square().flatten(1).mean(dim=1).cpu().double()
