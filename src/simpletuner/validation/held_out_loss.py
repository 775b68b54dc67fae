"""Held-out loss: the same samples, sigmas and noise at every step; only the weights differ.

B batch · C latent channels · H W latent side (image px / stride)
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.cache.batch_types import Batch
from simpletuner.data.sample_types import BucketedSample, MicroBatchPlan, SampleVisit
from simpletuner.events.event_types import (
    CaptionFitMeasured,
    Emit,
    LossEvaluated,
    SampleLossesMeasured,
)
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.flow.objective import add_noise, velocity_target
from simpletuner.peers import ALONE, Peers
from simpletuner.randomness import seed_at
from simpletuner.validation import caption_fit
from simpletuner.validation.convergence import LossTrajectory, find_resisting, paired_change
from simpletuner.validation.inference import Inference, eval_mode


@dataclass(frozen=True)
class HeldOutSet:
    """Samples that are measured together.

    split: "eval" decides which step is the best; "train" is a fixed part of the training set, and
    the distance between the two is overfitting. dataset: its name for users. batches: functions
    that load one batch each, with posterior-mean latents and the first caption of each sample.
    """

    split: str
    dataset: str
    sample_count: int
    batches: Sequence[Callable[[], Batch]]


def choose_samples(placed: Sequence[BucketedSample], count: int, seed: int) -> list[int]:
    """Return the indices of `count` samples, chosen by a hash of their ids.

    Adding data to the dataset changes few of them.
    """
    ranked = sorted(
        range(len(placed)), key=lambda index: seed_at(seed, "heldout", placed[index].sample.id)
    )
    return sorted(ranked[:count])


def fixed_batches(
    placed: Sequence[BucketedSample], indices: Sequence[int], batch_size: int
) -> list[MicroBatchPlan]:
    """Return micro-batches of samples of one bucket, each sample with its first caption."""
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in indices:
        buckets[placed[index].bucket_px].append(index)
    groups = [
        members[start : start + batch_size]
        for members in buckets.values()
        for start in range(0, len(members), batch_size)
    ]
    visits = [tuple(SampleVisit(index, 0, 0, 0) for index in group) for group in groups]
    return [MicroBatchPlan(number, 0, group) for number, group in enumerate(visits)]


def sigma_midpoints(count: int) -> list[float]:
    """Return the equidistant sigmas (i + 1/2) / count."""
    return [(index + 0.5) / count for index in range(count)]


def fixed_noise(seed: int, sample_id: str, index: int, shape: torch.Size) -> Tensor:
    """Return the noise (C, H, W) of one sample at its index-th sigma, sampled on the CPU."""
    generator = torch.Generator().manual_seed(seed_at(seed, "heldout-noise", sample_id, index))
    return torch.randn(shape, generator=generator)


def _key_of(held_out_set: HeldOutSet) -> str:
    return f"{held_out_set.split}/{held_out_set.dataset}"


class HeldOutEvaluator:
    """Measures sets of samples; stores the losses of the first measurement, and the best step.

    Several processes share out the batches, and each has all losses afterwards. The loss is the
    mean squared error of the velocity, whatever loss_type trains, so that runs can be compared.
    """

    def __init__(
        self,
        inference: Inference,
        sets: Sequence[HeldOutSet],
        sigma_count: int,
        seed: int,
        peers: Peers = ALONE,
    ) -> None:
        self.inference = inference
        self.peers = peers
        self.sets = tuple(sets)
        self.sigmas = sigma_midpoints(sigma_count)
        self.seed = seed
        self.best_step: int | None = None
        self.best_loss = math.inf
        self.last_step: int | None = None
        self.trajectory = LossTrajectory()
        self._last: dict[str, dict[str, float]] = {}
        self._baseline: dict[str, dict[str, float]] = {}
        self._best_step_samples: list[str] = []

    def evaluate(self, transformer: nn.Module, step: int, emit: Emit) -> bool:
        """Measure every set and emit the losses; return whether the eval loss is the lowest yet."""
        measured = [
            (held_out_set, self._measure(transformer, held_out_set, emit))
            for held_out_set in self.sets
        ]
        eval_losses = {
            sample: statistics.fmean(losses[sample])
            for held_out_set, losses in measured
            if held_out_set.split == "eval"
            for sample in sorted(losses)
        }
        loss = statistics.fmean(eval_losses.values()) if eval_losses else math.inf
        samples = list(eval_losses)
        if self._best_step_samples not in ([], samples):
            # The eval dataset changed since then, so the losses cannot be compared.
            self.best_step, self.best_loss = None, math.inf
        is_best = loss < self.best_loss
        self._best_step_samples = samples
        self.last_step = step
        if is_best:
            self.best_step, self.best_loss = step, loss
        if eval_losses:
            self.trajectory.add(step, eval_losses)
        for held_out_set, losses in measured:
            if losses and held_out_set.split == "train" and step == 0:
                self._compare_captions(transformer, held_out_set, losses, emit)
            if losses:
                best = is_best and held_out_set.split == "eval"
                emit(self._summary(held_out_set, losses, step, best))
        return is_best

    def state_dict(self) -> dict[str, object]:
        """Return, as JSON, what a resumed run needs to compare with step 0."""
        loss = self.best_loss if math.isfinite(self.best_loss) else None
        return {
            "baseline": self._baseline,
            "best_step": self.best_step,
            "best_loss": loss,
            "last_step": self.last_step,
            "among": self._best_step_samples,
            "last": self._last,
            "trajectory": self.trajectory.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._baseline, self.best_step = state["baseline"], state["best_step"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.last_step, self._best_step_samples = state.get("last_step"), state.get("among", [])
        self._last = state.get("last", {})  # checkpoints of earlier versions have neither
        if "trajectory" in state:
            self.trajectory.load_state_dict(state["trajectory"])

    def emit_sample_losses(self, step: int, emit: Emit) -> None:
        """Emit the losses of each sample at the first measurement and at the last one."""
        for held_out_set in self.sets:
            key = _key_of(held_out_set)
            first, last = self._baseline.get(key, {}), self._last.get(key, {})
            losses = {name: (first[name], last[name]) for name in last if name in first}
            if losses:
                names = tuple(find_resisting(losses)) if held_out_set.split == "train" else ()
                emit(
                    SampleLossesMeasured(
                        step, held_out_set.dataset, held_out_set.split, losses, names
                    )
                )

    def _compare_captions(
        self,
        transformer: nn.Module,
        held_out_set: HeldOutSet,
        losses: Mapping[str, list[float]],
        emit: Emit,
    ) -> None:
        """Emit which training images are predicted hardly better with their own caption."""
        sigmas = caption_fit.compared_sigmas(self.sigmas)
        if not sigmas or len(losses) < caption_fit.MIN_COMPARED_IMAGES:
            return
        with eval_mode(transformer):
            margins = caption_fit.measure_margins(
                held_out_set.batches, losses, sigmas, partial(self._losses, transformer), self.peers
            )
        unfit = tuple(caption_fit.find_unfit(margins))
        emit(CaptionFitMeasured(held_out_set.dataset, margins, unfit))

    def _summary(
        self, held_out_set: HeldOutSet, samples: Mapping[str, list[float]], step: int, best: bool
    ) -> LossEvaluated:
        means = {sample: statistics.fmean(losses) for sample, losses in samples.items()}
        key = _key_of(held_out_set)
        baseline = self._baseline.setdefault(key, means)
        self._last[key] = means
        by_sigma = zip(
            self.sigmas, map(statistics.fmean, zip(*samples.values(), strict=True)), strict=True
        )
        loss = statistics.fmean(means.values())
        return LossEvaluated(
            step,
            held_out_set.dataset,
            held_out_set.split,
            loss,
            *paired_change(means, baseline),
            tuple(by_sigma),
            best,
        )

    def _measure(
        self, transformer: nn.Module, held_out_set: HeldOutSet, emit: Emit
    ) -> dict[str, list[float]]:
        """Return the losses of each sample id, one per sigma; they do not depend on the batch."""
        losses: dict[str, list[float]] = {}
        own = self.peers.share_passes(held_out_set.batches)
        count = held_out_set.sample_count * len(own) // len(held_out_set.batches)
        self.inference.family.prepare_sigmas(transformer, torch.tensor(self.sigmas))
        with (
            eval_mode(transformer),
            StageReporter(emit, f"evaluate {held_out_set.split}", count, "samples") as stage,
        ):
            for place, load_batch in own:
                batch = load_batch()
                columns = [
                    self._losses(transformer, batch, index) for index in range(len(self.sigmas))
                ]
                rows = torch.stack(columns, dim=1).tolist()
                if place is not None:
                    losses.update(zip(batch.sample_ids, rows, strict=True))
                stage.advance(len(batch.sample_ids))
        return {
            sample: row for part in self.peers.gather_json(losses) for sample, row in part.items()
        }

    def _losses(self, transformer: nn.Module, batch: Batch, index: int) -> Tensor:
        """Return the losses of a batch at the index-th sigma, (B,) float64."""
        device = self.inference.device
        latents = batch.latents.to(device)
        noise = torch.stack(
            [
                fixed_noise(self.seed, sample, index, latents.shape[1:])
                for sample in batch.sample_ids
            ]
        ).to(device)
        sigma = torch.full((len(latents),), self.sigmas[index])
        text = batch.text.to(device, self.inference.text_dtype)
        predicted = self.inference.predict_velocity(
            transformer, add_noise(latents, noise, sigma.to(device)), sigma, text
        )
        error = predicted - velocity_target(latents, noise)
        return error.square().flatten(1).mean(dim=1).cpu().double()
