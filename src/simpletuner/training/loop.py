"""The training loop, and the file to read first.

A run loads its state; then, for each step, it trains, saves, validates and emits what happened.
Nothing random is carried from one step to the next: order, captions, noise, sigmas and dropout are
functions of (seed, step), so a resumed run equals a run that was never interrupted.

Read next, for one training step: flow/densities.py (which sigmas), flow/objective.py (noise, path
and loss), base_targets.py (the base's prediction as a target), the family's `predict_velocity` with
its transformer, and optimizer_step.py (gradients to weights). build.py makes the TrainerContext.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.config.schema import FlowOptions
from simpletuner.data.epoch_timeline import EpochTimeline
from simpletuner.errors import TrainingDiverged, TrainingStopped
from simpletuner.events.event_types import Emit, StepCompleted, WarningIssued
from simpletuner.flow.densities import sample_sigmas
from simpletuner.flow.loss_weights import loss_weight
from simpletuner.flow.objective import add_noise, sample_noise_pair, velocity_target
from simpletuner.flow.rollout import (
    choose_rollouts,
    mixflow_sigma,
    roll_out,
    rollout_probability,
)
from simpletuner.models.family import PredictVelocity
from simpletuner.randomness import seed_at
from simpletuner.training.base_targets import BaseNetwork, weighted_losses
from simpletuner.training.device import ComputeDevice, copy_inputs
from simpletuner.training.ema import Ema
from simpletuner.training.optimizer_step import OptimizerStep
from simpletuner.training.optimizers import set_optimizer_mode
from simpletuner.training.parameter_groups import set_rate
from simpletuner.training.world import World
from simpletuner.validation.inference import eval_mode

StepCallback = Callable[[int], None]  # takes the number of completed optimizer steps


@dataclass(frozen=True)
class TrainSchedule:
    """Length of a run, in optimizer steps and micro-batches.

    accumulation_steps: micro-batches of one optimizer step, over all processes together.
    nonfinite_patience: how many steps in a row may be skipped for a loss that is not finite.
    timeline: the epochs where datasets start or end within the run; None where all epochs have
    batches_per_epoch micro-batches.
    sigma_chunk_steps: for so many steps at once is computed ahead what depends on sigma alone.
    """

    total_steps: int
    accumulation_steps: int
    batches_per_epoch: int
    nonfinite_patience: int
    timeline: EpochTimeline | None = None
    sigma_chunk_steps: int = 1

    def epoch_at(self, step: int) -> int:
        """Return how many epochs are complete after `step` steps."""
        return int(self.epochs_at(step))

    def epochs_at(self, step: int) -> float:
        """Return how many epochs are complete after `step` steps, with the part of the next one."""
        micro_batches = step * self.accumulation_steps
        if self.timeline is not None:
            return self.timeline.progress(micro_batches)
        return micro_batches / self.batches_per_epoch


@dataclass(frozen=True)
class ScheduledCallback:
    """A callback that runs whenever `interval_index` of the step goes up, and after the last step.

    at_start: whether it also runs before the first step. A resumed run repeats the callbacks of its
    step, so a callback must do nothing for a step that it has already handled.
    """

    interval_index: Callable[[int], int]
    callback: StepCallback
    at_start: bool = False

    def is_due(self, step: int, total: int) -> bool:
        if step == 0:
            return self.at_start
        return step >= total or self.interval_index(step) > self.interval_index(step - 1)


class MicroBatchShape(NamedTuple):
    """Size of a micro-batch, and the noise levels of its dataset.

    image_tokens: 2x2 patches of one sample. sigma_offset: timestep_sampling_offset.
    """

    samples: int
    image_tokens: int
    sigma_offset: float = 0.0


@dataclass
class TrainerContext:
    """Everything that the loop works with; build.py makes it.

    predict_velocity: the family's function with the transformer, which an engine may wrap; the loop
    itself only sets the mode of the transformer. prepare_sigmas: the family's function, which
    computes ahead what depends on sigma alone. base_network: the same without the adapter.
    weight_penalty: from the place of a micro-batch within its step, what to add to its loss.
    learning_rate: from a step, counted from 0.
    load_batch, micro_batch_shape: from the number of a micro-batch, counted from 0 over the whole
    run. world: the processes, among which the micro-batches of a step are shared out.
    resumed_step: steps completed by earlier processes. requested_callbacks: what a user asked for
    since the last call. ends_after: whether early stopping ends the run with a step.
    adapter_copies: a context for all passes of a step, in which the adapters' factors are cast
    once. consecutive_skipped_steps: steps in a row without an update.
    """

    predict_velocity: PredictVelocity
    transformer: nn.Module
    base_network: BaseNetwork
    weight_penalty: Callable[[int], Tensor | float]
    device: ComputeDevice
    optimizer: Optimizer
    optimizer_step: OptimizerStep
    ema: Ema | None
    schedule: TrainSchedule
    world: World
    seed: int
    flow_options: FlowOptions
    uses_dropout: bool
    learning_rate: Callable[[int], float]
    load_batch: Callable[[int], Batch]
    micro_batch_shape: Callable[[int], MicroBatchShape]
    resumed_step: int
    save_checkpoint: StepCallback
    callbacks: tuple[ScheduledCallback, ...]
    requested_callbacks: Callable[[], list[StepCallback]]
    stop_requested: Callable[[], bool]
    emit: Emit
    ends_after: Callable[[int], bool] = lambda step: False
    adapter_copies: Callable[[], AbstractContextManager[None]] = nullcontext
    prepare_sigmas: Callable[[Tensor], None] = lambda sigma: None
    consecutive_skipped_steps: int = 0


def train(context: TrainerContext) -> int:
    """Run to the last step and return its number.

    Raises TrainingStopped, after a checkpoint was saved, when a stop was requested. A callback may
    raise it too; the resumed run repeats that callback.
    """
    step, total = context.resumed_step, context.schedule.total_steps
    try:
        run_due_callbacks(context, step)
        while step < total and not context.ends_after(step):
            completed = train_step(context, step)
            step += 1
            context.emit(completed)
            run_due_callbacks(context, step)
            if context.stop_requested() and step < total and not context.ends_after(step):
                raise TrainingStopped
    except TrainingStopped:
        if step:
            context.save_checkpoint(step)
        raise TrainingStopped(
            f"stopped after step {step} of {total}. Run the same command to resume"
        ) from None
    return step


def run_due_callbacks(context: TrainerContext, step: int) -> None:
    """Run the callbacks that are due or requested after `step` steps, on the evaluation weights.

    Where one of them ends the run, those of the last step follow.
    """
    ended = context.ends_after(step)
    last_step = step if ended else context.schedule.total_steps
    due = [
        scheduled.callback for scheduled in context.callbacks if scheduled.is_due(step, last_step)
    ]
    try:
        for callback in (*due, *context.requested_callbacks()):
            # A schedule-free optimizer evaluates other weights than it trains.
            set_optimizer_mode(context.optimizer, training=False)
            callback(step)
            # The next step reports its own peak, not that of images.
            context.device.hardware.reset_peak()
    finally:
        set_optimizer_mode(context.optimizer, training=True)
    if context.ends_after(step) and not ended and step < last_step:
        run_due_callbacks(context, step)


def train_step(context: TrainerContext, step: int) -> StepCompleted:
    """Run one optimizer step over all of its micro-batches; every sample has the same weight."""
    started = time.perf_counter()
    learning_rate = set_learning_rate(context, step)
    prepare_next_sigmas(context, step)
    micro_batches = split_into_micro_batches(context, step)
    sample_count = sum(len(sigma) for _, sigma in micro_batches)
    losses: dict[int, Tensor] = {}
    trained_samples: list[tuple[str, float]] = []
    with context.adapter_copies():
        for place, (number, sigma) in context.world.share(micro_batches):
            batch = context.load_batch(number)
            losses[place] = backward_micro_batch(context, batch, sigma, sample_count, number, place)
            trained_samples += zip(batch.sample_ids, sigma.tolist(), strict=True)
    loss, gradient_norm = finish_gradients(context, losses, len(micro_batches))
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        update_weights(context, step)
    else:
        handle_nonfinite_step(context, step, loss, gradient_norm, trained_samples)
    context.optimizer_step.zero_grad()
    return StepCompleted(
        step + 1,
        context.schedule.total_steps,
        context.schedule.epoch_at(step),
        loss,
        learning_rate,
        gradient_norm,
        time.perf_counter() - started,
        sample_count,
        context.device.peak_memory_gib(),
    )


def finish_gradients(
    context: TrainerContext, losses: dict[int, Tensor], count: int
) -> tuple[float, float]:
    """Sum and clip the gradients of all micro-batches, and return the step's loss and their norm.

    Reading a number makes the host wait for the device, so both are read at once. count: of the
    micro-batches of all processes.
    """
    device = context.device.device
    by_place = context.world.sum_by_place(losses, count, device)
    norm = context.optimizer_step.clip_gradients()
    *parts, gradient_norm = torch.cat([by_place, norm.to(by_place).view(1)]).tolist()
    return sum(parts), gradient_norm


def set_learning_rate(context: TrainerContext, step: int) -> float:
    """Set the learning rate of the step, and return it without the factors of lr_by_module."""
    rate = context.learning_rate(step)
    set_rate(context.optimizer, rate)
    return rate


def split_into_micro_batches(context: TrainerContext, step: int) -> list[tuple[int, Tensor]]:
    """Return the micro-batches of a step: the number of each, and the sigmas of its samples.

    The sigmas are sampled for the whole step at once, so that they can be stratified over it.
    """
    accumulation = context.schedule.accumulation_steps
    numbers = range(step * accumulation, (step + 1) * accumulation)
    shapes = [context.micro_batch_shape(number) for number in numbers]
    count = sum(shape.samples for shape in shapes)
    # A step has one density: its automatic shift follows the mean size of the samples.
    mean_tokens = sum(shape.samples * shape.image_tokens for shape in shapes) // count
    offsets = [shape.sigma_offset for shape in shapes for _ in range(shape.samples)]
    sigmas = sample_sigmas(context.flow_options, context.seed, step, count, mean_tokens, offsets)
    return list(zip(numbers, torch.split(sigmas, [shape.samples for shape in shapes]), strict=True))


def prepare_next_sigmas(context: TrainerContext, step: int) -> None:
    """Compute ahead what this process needs for its sigmas, at the start of a chunk of steps."""
    length = context.schedule.sigma_chunk_steps
    # A resumed run may begin within a chunk, and needs the rest of it.
    if step % length and step != context.resumed_step:
        return
    end = min(step - step % length + length, context.schedule.total_steps)
    sigmas = [
        sigma
        for each in range(step, end)
        for _, (_, sigma) in context.world.share(split_into_micro_batches(context, each))
    ]
    if sigmas:
        context.prepare_sigmas(torch.cat(sigmas))


def backward_micro_batch(
    context: TrainerContext, batch: Batch, sigma: Tensor, sample_count: int, number: int, place: int
) -> Tensor:
    """Add the gradient of one micro-batch, and return its part of the loss of the step.

    The sum over its samples is divided by the samples of the whole step (sample_count). The mean of
    the means would give the samples of a smaller micro-batch a larger weight. number: of the
    micro-batch in the run; place: within its step.
    """
    if context.uses_dropout:
        # By micro-batch, so that dropout is the same on however many processes they are.
        torch.manual_seed(seed_at(context.seed, "dropout", number))
    context.transformer.train()
    step = number // context.schedule.accumulation_steps
    sample_losses = compute_losses(context, batch, sigma, step)
    loss = sample_losses.sum() / sample_count + context.weight_penalty(place)
    context.optimizer_step.backward(loss, place)
    return loss.detach()


def compute_losses(context: TrainerContext, batch: Batch, sigma: Tensor, step: int) -> Tensor:
    """Return the loss of every row, (R,) float32 on the device: the flow matching objective.

    batch: latents (R, C, H, W), text embeddings, one visit key per row, the address of its noise,
    and the weights of its two targets, the flow's own and the base's prediction. sigma: (B,)
    float32, of the samples. step: decides how many samples are rolled out.
    """
    options, seed, device = context.flow_options, context.seed, context.device.device
    sigma = sigma.repeat(batch.copies)
    noise, input_noise = batch.noise or sample_noise_pair(
        batch.visit_keys, batch.latents.shape, options, seed
    )
    input_sigma = mixflow_sigma(options, seed, batch.visit_keys, sigma)
    rollouts = choose_rollouts(options, seed, step, batch.visit_keys, sigma)
    host_sigma = sigma
    # Both levels in one copy; pinned tensors are copied while the host prepares the rest.
    sigma, input_sigma = torch.stack((sigma, input_sigma)).to(device, non_blocking=True)
    latents, noise, input_noise = copy_inputs((batch.latents, noise, input_noise), device)
    text = batch.text.to(device, non_blocking=True)
    x_sigma = add_noise(latents, input_noise, input_sigma)
    target = velocity_target(latents, noise)
    if rollouts.rows:
        rows = list(rollouts.rows)
        predict = partial(predict_rows, context, text)
        x_sigma[rows], target[rows] = roll_out(rollouts, latents, noise, sigma, predict)
    elif context.world.equal_passes and rollout_probability(options, step):
        # Another process may have a rollout now, and needs the part of the network that is here.
        predict_rows(context, text, x_sigma[:1], sigma[:1], (0,))
    base_velocity = context.base_network.velocity(x_sigma, host_sigma, text, batch.weights)
    with context.device.autocast():
        velocity = context.predict_velocity(x_sigma, host_sigma, text)
    losses = weighted_losses(velocity, target, base_velocity, sigma, batch.weights, options)
    if options.loss_weight_by_sigma is not None:
        losses = losses * loss_weight(options.loss_weight_by_sigma, sigma)
    return losses


def predict_rows(
    context: TrainerContext, text: TextBatch, x_sigma: Tensor, sigma: Tensor, rows: Sequence[int]
) -> Tensor:
    """Return the velocity of some samples of a batch without gradient and without dropout.

    text: of the whole batch. This has an autocast context of its own, so that the training pass
    does not find weights in the cache of casts that were cast here, without gradient.
    """
    with eval_mode(context.transformer), context.device.autocast():
        return context.predict_velocity(x_sigma, sigma, text.select(rows))


def update_weights(context: TrainerContext, step: int) -> None:
    """Apply the gradients; then move the average (EMA) towards the new weights."""
    context.consecutive_skipped_steps = 0
    context.optimizer_step.apply()
    if context.ema is not None:
        context.ema.update(step)


def handle_nonfinite_step(
    context: TrainerContext,
    step: int,
    loss: float,
    gradient_norm: float,
    trained_samples: list[tuple[str, float]],
) -> None:
    """Skip the update and name the samples of the step, of all processes, with their sigmas.

    trained_samples: those of this process.

    Raises TrainingDiverged after more than `nonfinite_loss_patience` such steps in a row, and where
    part of the update is already in the weights.
    """
    context.consecutive_skipped_steps += 1
    of_all = [pair for part in context.world.gather_json(trained_samples) for pair in part]
    samples = ", ".join(f"{name} (sigma {sigma:.4f})" for name, sigma in of_all)
    summary = f"step {step + 1}: loss {loss}, gradient norm {gradient_norm}; samples: {samples}"
    if (
        context.consecutive_skipped_steps > context.schedule.nonfinite_patience
        or context.optimizer_step.weights_modified
    ):
        raise TrainingDiverged(
            f"{summary}. The last checkpoint is not affected. "
            "Lower learning_rate, or look at these images"
        )
    context.emit(WarningIssued(f"{summary}; the update of this step was skipped"))
