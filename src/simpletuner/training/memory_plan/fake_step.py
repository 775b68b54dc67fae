"""Measure one training step on tensors without data (FakeTensorMode), which need no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simpletuner.adapters.delta_penalty import delta_penalty
from simpletuner.cache.batch_types import Batch, TargetWeights, TextBatch
from simpletuner.config.schema import ModelOptions, RunConfig
from simpletuner.events.sinks import null_emit
from simpletuner.models.family import BlockMemoryPolicy, ModelFamily, ModelSpec
from simpletuner.training import loop, train_state
from simpletuner.training.base_targets import BaseNetwork
from simpletuner.training.device import ComputeDevice, select_device
from simpletuner.training.gradient_sum import held_sums
from simpletuner.training.loop import MicroBatchShape, TrainerContext, TrainSchedule
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from simpletuner.training.memory_plan.repeated_blocks import RepeatedBlocks, find_equal_blocks
from simpletuner.training.sharding import Sharding
from simpletuner.training.train_state import TrainState
from simpletuner.training.world import World

# The second micro-batch has the gradients of the first in memory; a third one is like the second,
# but for the sums that an adapter's gradients are kept in (gradient_sum.held_sums).
MEASURED_MICRO_BATCHES = 2


@dataclass(frozen=True)
class BatchShape:
    """The shape of a micro-batch.

    size_px: (width, height). text_rows: of each sample. copies: how often each sample is in it.
    towards_base: whether the base's prediction is a target. weighted: whether the cells of a latent
    have weights, as masks give them.
    """

    samples: int
    size_px: tuple[int, int]
    text_rows: int
    copies: int = 1
    towards_base: bool = False
    weighted: bool = False


@dataclass(frozen=True)
class TargetUse:
    """Needs of the datasets of a run: the base's prediction as a target, or masks."""

    towards_base: bool = False
    masked: bool = False

    def apply(self, feed: BatchShape) -> BatchShape:
        """Return the shape of a batch with these, in addition to what the options ask for."""
        towards_base = feed.towards_base or self.towards_base
        return replace(feed, towards_base=towards_base, weighted=feed.weighted or self.masked)


NO_TARGETS = TargetUse()


@dataclass(frozen=True)
class StepMeasurement:
    """The memory and work of one optimizer step.

    peak: bytes by part at the highest moment. flops: of all micro-batches, without rollouts.
    rollout_flops: of one forward pass without gradient over all samples; 0 where none are rolled
    out. Such a pass stores no activations, so it does not raise the peak. base_flops: the part of
    flops that the base's predictions take. trained, trained_bytes:
    the trainable parameters. optimizer: bytes of the optimizer's state. trained_tensors: bytes of
    each trainable parameter. activations: the most bytes of activations at one moment.
    trained_units: units of the family's shard_units that are trained, and 1 for what is outside.
    """

    peak: dict[str, int]
    flops: float
    trained: int
    trained_bytes: int
    optimizer: int
    rollout_flops: float = 0.0
    trained_tensors: list[int] = field(default_factory=list)
    activations: int = 0
    trained_units: int = 0
    base_flops: float = 0.0

    @property
    def item_bytes(self) -> int:
        """Return the bytes of a trained number."""
        return self.trained_bytes // self.trained


def measure_fake_step(
    run: RunConfig,
    family: ModelFamily,
    spec: ModelSpec,
    memory: BlockMemoryPolicy,
    feed: BatchShape,
    granule: int,
) -> StepMeasurement:
    """Attach adapters, build the optimizer and run a step as a run does.

    The network of the spec is changed by this. Only the checkpointing of `memory` is applied;
    nothing is offloaded to the host, and there is no moving average.

    The adapter is attached on the meta device, where the network is. The rest runs on fake tensors
    of the CPU: fake CUDA tensors abort on a machine without a GPU, and on the meta device attention
    would store all S x S scores.
    """
    network = spec.transformer
    with torch.random.fork_rng(devices=[]):
        trained = {
            id(parameter)
            for parameter in train_state.attach_trainable_parameters(
                run, family, network, null_emit
            ).values()
        }
        part = "adapters" if run.model.model_type == "lora" else "weights"
        family.place_blocks(network, BlockMemoryPolicy(memory.checkpointed, memory.interval), None)
        count = MemoryTrackerMode(granule)
        numbers = memory.checkpointed_block_numbers(len(spec.blocks))
        repeated = RepeatedBlocks(find_equal_blocks(spec.blocks, numbers), count)
        family.intercept_blocks(network, repeated.run_block)
        with FakeTensorMode(allow_non_fake_inputs=True), count:
            named = materialise_parameters(network, trained, part, count)
            count.current_part = "optimizer"
            micro = min(run.training.gradient_accumulation_steps, MEASURED_MICRO_BATCHES)
            # One process, without an engine: the plan divides its bytes (world_layout.py).
            sharding = Sharding(World(), run.model.model_type == "lora", run.optimizer)
            net = train_state.assemble_train_state(
                without_ema(run), network, named, sharding, micro
            )
            create_optimizer_state(net)
            measured = run_and_measure_step(run, family, spec, feed, net, count, repeated)
            # A few blocks of each kind stand for all equal ones, so that a plan takes seconds.
            if repeated.is_exact:
                return measured
            # The blocks are not as equal as they look, so each of them is run.
            repeated.run_every_block()
            return run_and_measure_step(run, family, spec, feed, net, count, repeated)


def cpu_device_without_gpu_options(options: ModelOptions) -> ComputeDevice:
    """Return the CPU with the dtypes of the run, without the options that need a GPU."""
    without_gpu = {
        "device": "cpu",
        "musubi_blocks_to_swap": 0.0,
        "gradient_checkpointing_backend": "torch",
    }
    return select_device(options.model_copy(update=without_gpu))


def without_ema(run: RunConfig) -> RunConfig:
    """Return the same run without a moving average; its size is known without measuring."""
    return run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"use_ema": False})})


def materialise_parameters(
    network: nn.Module, trained: set[int], part: str, count: MemoryTrackerMode
) -> dict[str, nn.Parameter]:
    """Replace the meta tensors of a network, and return the trainable parameters by name.

    Module.to refuses to copy meta tensors. part: what trainable parameters are counted as.
    """
    named: dict[str, nn.Parameter] = {}
    for prefix, module in network.named_modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                is_trained = id(tensor) in trained
                count.current_part = part if is_trained else "weights"
                fresh = nn.Parameter(_empty(tensor), requires_grad=tensor.requires_grad)
                module._parameters[name] = fresh
                if is_trained:
                    named[f"{prefix}.{name}"] = fresh
        count.current_part = "weights"
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _empty(buffer)
    return named


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def create_optimizer_state(net: TrainState) -> None:
    """Run an optimizer step, because the state exists from the second training step on."""
    for parameter in net.trainable_parameters.values():
        parameter.grad = torch.empty_like(parameter)
    net.optimizer.step()
    net.optimizer.zero_grad(set_to_none=True)


def run_and_measure_step(
    run: RunConfig,
    family: ModelFamily,
    spec: ModelSpec,
    feed: BatchShape,
    net: TrainState,
    count: MemoryTrackerMode,
    repeated: RepeatedBlocks,
) -> StepMeasurement:
    """Run train_step of the loop under the counter."""
    accumulation = run.training.gradient_accumulation_steps
    micro = min(accumulation, MEASURED_MICRO_BATCHES)
    state_bytes = count.live_bytes["optimizer"]
    parts = make_fake_context(run, family, spec, feed, net, TrainSchedule(1, micro, 1, 0), count)
    count.reset_peak()
    with count.track_step():
        loop.train_step(parts, 0)
    repeated.finish_pass()
    peak, flops = dict(count.peak_bytes), count.flops
    activations = count.peak_activation_bytes
    batch = parts.load_batch(0)
    sigma = torch.ones(feed.samples * feed.copies)
    if run.flow.scheduled_sampling_probability:
        loop.predict_rows(parts, batch.text, batch.latents, sigma, range(len(sigma)))
    rollout_flops = count.flops - flops
    parts.base_network.velocity(batch.latents, sigma, batch.text, batch.weights)
    repeated.finish_pass()
    base_flops = count.flops - flops - rollout_flops
    trained = sum(parameter.numel() for parameter in net.trainable_parameters.values())
    size = sum(parameter.nbytes for parameter in net.trainable_parameters.values())
    if net.uses_lora:
        # Not measured, because a plan runs two micro-batches at most.
        peak["temporaries"] += (held_sums(accumulation) - held_sums(micro)) * size
    return StepMeasurement(
        peak,
        flops * accumulation / micro,
        trained,
        size,
        state_bytes,
        rollout_flops * accumulation,
        [parameter.nbytes for parameter in net.trainable_parameters.values()],
        activations,
        count_trained_units(net.transformer, family.shard_units(net.transformer)),
        base_flops * accumulation,
    )


def count_trained_units(transformer: nn.Module, units: Sequence[nn.Module]) -> int:
    """Return how many units have trained parameters, and 1 more where others have some."""
    trained = [sum(p.requires_grad for p in unit.parameters()) for unit in units]
    outside = sum(p.requires_grad for p in transformer.parameters()) - sum(trained)
    return sum(map(bool, (*trained, outside)))


def make_fake_context(
    run: RunConfig,
    family: ModelFamily,
    spec: ModelSpec,
    feed: BatchShape,
    net: TrainState,
    plan: TrainSchedule,
    count: MemoryTrackerMode,
) -> TrainerContext:
    """Return a context that feeds batches without data to the step, and emits nothing.

    It has no rollouts: which samples they are depends on numbers, and these tensors have none.
    """
    constants = spec.constants
    width, height = (side // constants.stride_px for side in feed.size_px)
    names = tuple(str(number) for number in range(feed.samples))

    def batch(number: int) -> Batch:
        count.mark_forward_start()
        rows = feed.samples * feed.copies
        latents = torch.empty(rows, constants.latent_channels, height, width)
        tensors = {}
        lengths = {}
        for name, tensor in constants.text_tensors.items():
            shape = (feed.text_rows, tensor.width) if tensor.has_length else (tensor.width,)
            tensors[name] = torch.empty(rows, *shape, dtype=spec.text_dtype)
            if tensor.has_length:
                lengths[name] = (feed.text_rows,) * rows
        keys, text = names * feed.copies, TextBatch(tensors, lengths)
        weights = make_fake_weights(feed, (height, width))
        return Batch(latents, text, names, keys, weights=weights, copies=feed.copies)

    tokens = feed.size_px[0] * feed.size_px[1] // constants.token_px**2
    predict_velocity = partial(family.predict_velocity, net.transformer)
    device = cpu_device_without_gpu_options(run.model)
    return TrainerContext(
        predict_velocity=predict_velocity,
        transformer=net.transformer,
        base_network=BaseNetwork(net.transformer, predict_velocity, device.autocast),
        weight_penalty=delta_penalty(net.transformer, run.preservation.delta_weight_penalty),
        device=device,
        optimizer=net.optimizer,
        optimizer_step=net.optimizer_step,
        ema=net.ema,
        schedule=plan,
        world=World(),
        seed=run.training.seed,
        flow_options=run.flow.model_copy(update={"scheduled_sampling_probability": 0.0}),
        uses_dropout=run.adapter.lora_dropout > 0 and net.uses_lora,
        learning_rate=lambda step: net.optimizer_options.learning_rate,
        load_batch=batch,
        micro_batch_shape=lambda number: MicroBatchShape(feed.samples, tokens),
        resumed_step=0,
        save_checkpoint=lambda step: None,
        callbacks=(),
        requested_callbacks=list,
        stop_requested=lambda: False,
        emit=null_emit,
        adapter_copies=net.adapter_copies.current,
    )


def make_fake_weights(feed: BatchShape, size: tuple[int, int]) -> TargetWeights | None:
    """Return weights without data of all rows of a batch; None where its loss is the plain one."""
    if not feed.towards_base and not feed.weighted:
        return None
    rows = feed.samples * feed.copies
    shape = (rows, 1, *size) if feed.weighted else (rows, 1, 1, 1)
    base_rows = range(rows if feed.towards_base else 0)
    return TargetWeights(torch.empty(shape), torch.empty(shape), tuple(base_rows))
