"""The training loop. Load, then for each step: train, save, validate, tell.

Nothing random is carried from one step to the next: order, captions, noise, sigmas and dropout are
functions of (seed, step), so a resumed run is the run that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.cache.batch_types import Batch
from simpletuner.config.schema import FlowOptions
from simpletuner.errors import TrainingDiverged, TrainingStopped
from simpletuner.events.event_types import Emit, StepCompleted, WarningIssued
from simpletuner.flow.densities import sample_sigmas
from simpletuner.models.family import ModelFamily
from simpletuner.randomness import seed_at
from simpletuner.training.device import ComputeDevice
from simpletuner.training.ema import Ema
from simpletuner.training.objective import compute_losses
from simpletuner.training.optimizer_step import OptimizerStep
from simpletuner.training.optimizers import set_optimizer_mode


@dataclass(frozen=True)
class TrainSchedule:
    """Counts of a run. Everything is counted in optimizer steps."""

    total_steps: int
    accumulation_steps: int
    batches_per_epoch: int
    nonfinite_patience: int

    def epoch_at(self, step: int) -> int:
        """Whole epochs behind after `step` steps."""
        return step * self.accumulation_steps // self.batches_per_epoch


StepCallback = Callable[[int], None]


@dataclass(frozen=True)
class ScheduledCallback:
    """Something done at step 0, whenever `count` of the step goes up, and at the end.

    An action that is done already for a step does nothing: a resumed run asks for what was due once more.
    """

    interval_index: Callable[[int], int]
    callback: StepCallback
    at_start: bool = False

    def is_due(self, step: int, total: int) -> bool:
        if step == 0:
            return self.at_start
        return step >= total or self.interval_index(step) > self.interval_index(step - 1)


@dataclass
class TrainerContext:
    """What the loop works with; made by build.py.

    sizes: of a micro-batch, its samples and the image tokens of each. resumed_step: steps that are behind.
    asked: what somebody asks to be done now. skipped: steps in a row without an update.
    """

    family: ModelFamily
    transformer: nn.Module
    device: ComputeDevice
    optimizer: Optimizer
    optimizer_step: OptimizerStep
    ema: Ema | None
    schedule: TrainSchedule
    seed: int
    flow_options: FlowOptions
    uses_dropout: bool
    learning_rate: Callable[[int], float]
    load_batch: Callable[[int], Batch]
    micro_batch_shape: Callable[[int], tuple[int, int]]
    resumed_step: int
    save_checkpoint: StepCallback
    callbacks: tuple[ScheduledCallback, ...]
    requested_callbacks: Callable[[], list[StepCallback]]
    stop_requested: Callable[[], bool]
    emit: Emit
    consecutive_skipped_steps: int = 0


def train(parts: TrainerContext) -> int:
    """Run to the last step and return it. Stopped when asked to leave: saved, and resumable.

    Whatever is drawn or measured between steps may raise Stopped too; the resumed run does it again.
    """
    step, total = parts.resumed_step, parts.schedule.total_steps
    try:
        run_due_callbacks(parts, step)
        while step < total:
            done = train_step(parts, step)
            step += 1
            parts.emit(done)
            run_due_callbacks(parts, step)
            if parts.stop_requested() and step < total:
                raise TrainingStopped
    except TrainingStopped:
        if step:
            parts.save_checkpoint(step)
        raise TrainingStopped(
            f"stopped after step {step} of {total}; the same command goes on"
        ) from None
    return step


def run_due_callbacks(parts: TrainerContext, step: int) -> None:
    """Save, validate, evaluate: whatever is due or asked for after `step` steps, with evaluation weights."""
    due = [
        every.callback
        for every in parts.callbacks
        if every.is_due(step, parts.schedule.total_steps)
    ]
    try:
        for action in (*due, *parts.requested_callbacks()):
            set_optimizer_mode(parts.optimizer, training=False)
            action(step)
    finally:
        set_optimizer_mode(parts.optimizer, training=True)


def train_step(parts: TrainerContext, step: int) -> StepCompleted:
    """One optimizer step over `accumulation` micro-batches, each sample weighing the same."""
    started = time.perf_counter()
    plan = parts.schedule
    numbers = range(step * plan.accumulation_steps, (step + 1) * plan.accumulation_steps)
    sizes = [parts.micro_batch_shape(number) for number in numbers]
    count = sum(samples for samples, _ in sizes)
    tokens = sum(samples * each for samples, each in sizes) // count
    sigmas = sample_sigmas(parts.flow_options, parts.seed, step, count, tokens)
    rate = parts.learning_rate(step)
    for group in parts.optimizer.param_groups:
        group["lr"] = rate
    shares: list[Tensor] = []
    seen, used = 0, []
    for number in numbers:
        batch = parts.load_batch(number)
        sigma = sigmas[seen : seen + len(batch.visit_keys)]
        seen += len(batch.visit_keys)
        used += list(zip(batch.sample_ids, sigma.tolist(), strict=True))
        shares.append(backward_micro_batch(parts, batch, sigma, count, number))
    total = sum(
        torch.stack(shares).tolist()
    )  # the device is waited for once a step, not once a micro-batch
    norm = parts.optimizer_step.clip_gradients()
    if math.isfinite(total) and math.isfinite(norm):
        parts.consecutive_skipped_steps = 0
        parts.optimizer_step.apply()
        if parts.ema is not None:
            parts.ema.update(step)
    else:
        handle_nonfinite_step(parts, step, total, norm, used)
    parts.optimizer_step.zero_grad()
    seconds = time.perf_counter() - started
    memory = parts.device.peak_memory_gib()
    return StepCompleted(
        step + 1, plan.total_steps, plan.epoch_at(step), total, rate, norm, seconds, count, memory
    )


def backward_micro_batch(
    parts: TrainerContext, batch: Batch, sigma: Tensor, count: int, number: int
) -> Tensor:
    """Add one micro-batch's share of the gradient; returns its share of the loss."""
    if parts.uses_dropout:
        torch.manual_seed(seed_at(parts.seed, "dropout", number))
    parts.transformer.train()
    with parts.device.autocast():
        each = compute_losses(
            parts.family,
            parts.transformer,
            batch,
            sigma,
            parts.flow_options,
            parts.seed,
            parts.device.device,
        )
    loss = each.sum() / count
    parts.optimizer_step.backward(loss)
    return loss.detach()


def handle_nonfinite_step(
    parts: TrainerContext, step: int, loss: float, norm: float, used: list[tuple[str, float]]
) -> None:
    """Skip the update and name the samples. Stop beyond `nonfinite_loss_patience` such steps in a row, and
    where part of the update is in the weights already.
    """
    parts.consecutive_skipped_steps += 1
    samples = ", ".join(f"{name} (sigma {sigma:.4f})" for name, sigma in used)
    what = f"step {step + 1}: loss {loss}, gradient norm {norm}; samples: {samples}"
    if (
        parts.consecutive_skipped_steps > parts.schedule.nonfinite_patience
        or parts.optimizer_step.weights_modified
    ):
        raise TrainingDiverged(
            f"{what}. The last checkpoint is untouched. Lower learning_rate, or look at these pictures"
        )
    parts.emit(WarningIssued(f"{what}; this step's update was skipped"))
