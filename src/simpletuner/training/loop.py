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

from simpletuner.cache.types import Batch
from simpletuner.config.schema import FlowOptions
from simpletuner.errors import Stopped, TrainingDiverged
from simpletuner.events.types import Emit, Stepped, Warned
from simpletuner.flow.densities import draw_sigmas
from simpletuner.models.family import ModelFamily
from simpletuner.randomness import seed_at
from simpletuner.training.device import Device
from simpletuner.training.ema import Ema
from simpletuner.training.objective import losses
from simpletuner.training.optimizers import optimizer_mode
from simpletuner.training.update import Update


@dataclass(frozen=True)
class Plan:
    """Counts of a run. Everything is counted in optimizer steps."""

    total_steps: int
    accumulation: int
    batches_per_epoch: int
    patience: int

    def epoch(self, step: int) -> int:
        """Whole epochs behind after `step` steps."""
        return step * self.accumulation // self.batches_per_epoch


Action = Callable[[int], None]


@dataclass(frozen=True)
class Every:
    """Something done at step 0, whenever `count` of the step goes up, and at the end.

    An action that is done already for a step does nothing: a resumed run asks for what was due once more.
    """

    count: Callable[[int], int]
    action: Action
    at_start: bool = False

    def due(self, step: int, total: int) -> bool:
        if step == 0:
            return self.at_start
        return step >= total or self.count(step) > self.count(step - 1)


@dataclass
class Parts:
    """What the loop works with; made by build.py.

    sizes: of a micro-batch, its samples and the image tokens of each. resumed_step: steps that are behind.
    asked: what somebody asks to be done now. skipped: steps in a row without an update.
    """

    family: ModelFamily
    transformer: nn.Module
    device: Device
    optimizer: Optimizer
    update: Update
    ema: Ema | None
    plan: Plan
    seed: int
    flow: FlowOptions
    uses_dropout: bool
    learning_rate: Callable[[int], float]
    batch: Callable[[int], Batch]
    sizes: Callable[[int], tuple[int, int]]
    resumed_step: int
    save: Action
    every: tuple[Every, ...]
    asked: Callable[[], list[Action]]
    stop_requested: Callable[[], bool]
    emit: Emit
    skipped: int = 0


def train(parts: Parts) -> int:
    """Run to the last step and return it. Stopped when asked to leave: saved, and resumable.

    Whatever is drawn or measured between steps may raise Stopped too; the resumed run does it again.
    """
    step, total = parts.resumed_step, parts.plan.total_steps
    try:
        tell(parts, step)
        while step < total:
            done = train_step(parts, step)
            step += 1
            parts.emit(done)
            tell(parts, step)
            if parts.stop_requested() and step < total:
                raise Stopped
    except Stopped:
        if step:
            parts.save(step)
        raise Stopped(f"stopped after step {step} of {total}; the same command goes on") from None
    return step


def tell(parts: Parts, step: int) -> None:
    """Save, validate, evaluate: whatever is due or asked for after `step` steps, with evaluation weights."""
    due = [every.action for every in parts.every if every.due(step, parts.plan.total_steps)]
    try:
        for action in (*due, *parts.asked()):
            optimizer_mode(parts.optimizer, training=False)
            action(step)
    finally:
        optimizer_mode(parts.optimizer, training=True)


def train_step(parts: Parts, step: int) -> Stepped:
    """One optimizer step over `accumulation` micro-batches, each sample weighing the same."""
    started = time.perf_counter()
    plan = parts.plan
    numbers = range(step * plan.accumulation, (step + 1) * plan.accumulation)
    sizes = [parts.sizes(number) for number in numbers]
    count = sum(samples for samples, _ in sizes)
    tokens = sum(samples * each for samples, each in sizes) // count
    sigmas = draw_sigmas(parts.flow, parts.seed, step, count, tokens)
    rate = parts.learning_rate(step)
    for group in parts.optimizer.param_groups:
        group["lr"] = rate
    shares: list[Tensor] = []
    seen, used = 0, []
    for number in numbers:
        batch = parts.batch(number)
        sigma = sigmas[seen : seen + len(batch.visit_keys)]
        seen += len(batch.visit_keys)
        used += list(zip(batch.sample_ids, sigma.tolist(), strict=True))
        shares.append(backward(parts, batch, sigma, count, number))
    total = sum(torch.stack(shares).tolist())  # the device is waited for once a step, not once a micro-batch
    norm = parts.update.limit()
    if math.isfinite(total) and math.isfinite(norm):
        parts.skipped = 0
        parts.update.apply()
        if parts.ema is not None:
            parts.ema.update(step)
    else:
        refuse(parts, step, total, norm, used)
    parts.update.clear()
    seconds = time.perf_counter() - started
    memory = parts.device.peak_memory_gib()
    return Stepped(step + 1, plan.total_steps, plan.epoch(step), total, rate, norm, seconds, count, memory)


def backward(parts: Parts, batch: Batch, sigma: Tensor, count: int, number: int) -> Tensor:
    """Add one micro-batch's share of the gradient; returns its share of the loss."""
    if parts.uses_dropout:
        torch.manual_seed(seed_at(parts.seed, "dropout", number))
    parts.transformer.train()
    with parts.device.autocast():
        each = losses(
            parts.family, parts.transformer, batch, sigma, parts.flow, parts.seed, parts.device.device
        )
    loss = each.sum() / count
    parts.update.backward(loss)
    return loss.detach()


def refuse(parts: Parts, step: int, loss: float, norm: float, used: list[tuple[str, float]]) -> None:
    """Skip the update and name the samples. Stop beyond `nonfinite_loss_patience` such steps in a row, and
    where part of the update is in the weights already.
    """
    parts.skipped += 1
    samples = ", ".join(f"{name} (sigma {sigma:.4f})" for name, sigma in used)
    what = f"step {step + 1}: loss {loss}, gradient norm {norm}; samples: {samples}"
    if parts.skipped > parts.plan.patience or parts.update.touched:
        raise TrainingDiverged(
            f"{what}. The last checkpoint is untouched. Lower learning_rate, or look at these pictures"
        )
    parts.emit(Warned(f"{what}; this step's update was skipped"))
