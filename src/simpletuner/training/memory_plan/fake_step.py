"""One whole training step of the configured size on tensors without contents: no weights, no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.config.schema import ModelOptions, RunConfig
from simpletuner.events.sinks import null_emit
from simpletuner.models.family import BlockMemoryPolicy, ModelFamily, ModelSpec
from simpletuner.training import loop, train_state
from simpletuner.training.device import ComputeDevice, select_device
from simpletuner.training.loop import MicroBatchShape, TrainerContext, TrainSchedule
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from simpletuner.training.train_state import TrainState

MEASURED_MICRO_BATCHES = (
    2  # the second finds the gradients of the first; a third would find nothing new
)


@dataclass(frozen=True)
class BatchShape:
    """What a micro-batch is: samples of one size (width, height), each with as many text rows."""

    samples: int
    size_px: tuple[int, int]
    text_rows: int


@dataclass(frozen=True)
class StepMeasurement:
    """Of one optimizer step. peak: bytes by part at the highest moment. flops: of all its micro-batches.

    trained, trained_bytes: parameters that are trained. optimizer: bytes of its states.
    """

    peak: dict[str, int]
    flops: float
    trained: int
    trained_bytes: int
    optimizer: int


def measure_fake_step(
    run: RunConfig,
    family: ModelFamily,
    sketch: ModelSpec,
    memory: BlockMemoryPolicy,
    feed: BatchShape,
    granule: int,
) -> StepMeasurement:
    """Attach, equip and step as a run does, on the sketch's network, which is used up.

    Of `memory`, what is recomputed; nothing waits on the host. The moving average is left out.

    The adapter is attached on the meta device, where the network is; the rest runs on fake tensors
    of the CPU: those of CUDA abort where there is none, and on meta attention keeps all S x S
    scores.
    """
    network = sketch.transformer
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
        with FakeTensorMode(allow_non_fake_inputs=True), count:
            named = materialise_parameters(network, trained, part, count)
            count.current_part = "optimizer"
            net = train_state.assemble_train_state(without_ema(run), network, named)
            create_optimizer_state(net)
            return run_and_measure_step(run, family, sketch, feed, net, count)


def cpu_planning_device(options: ModelOptions) -> ComputeDevice:
    """The CPU in the run's number formats, whatever else the options ask of a GPU."""
    plain = {
        "device": "cpu",
        "musubi_blocks_to_swap": 0.0,
        "gradient_checkpointing_backend": "torch",
    }
    return select_device(options.model_copy(update=plain))


def without_ema(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"use_ema": False})})


def materialise_parameters(
    network: nn.Module, trained: set[int], part: str, count: MemoryTrackerMode
) -> dict[str, nn.Parameter]:
    """Tensors in place of the meta device's (Module.to refuses); those that are trained, by name.

    part: what those are counted as.
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
    """A first optimizer step: its states are there from the second training step on."""
    for parameter in net.trainable_parameters.values():
        parameter.grad = torch.empty_like(parameter)
    net.optimizer.step()
    net.optimizer.zero_grad(set_to_none=True)


def run_and_measure_step(
    run: RunConfig,
    family: ModelFamily,
    sketch: ModelSpec,
    feed: BatchShape,
    net: TrainState,
    count: MemoryTrackerMode,
) -> StepMeasurement:
    """The loop's own step, counted."""
    made = run.training.gradient_accumulation_steps
    micro = min(made, MEASURED_MICRO_BATCHES)
    states = count.live_bytes["optimizer"]
    parts = make_fake_context(run, family, sketch, feed, net, TrainSchedule(1, micro, 1, 0), count)
    count.reset_peak()
    with count.track_step():
        loop.train_step(parts, 0)
    trained = sum(parameter.numel() for parameter in net.trainable_parameters.values())
    size = sum(parameter.nbytes for parameter in net.trainable_parameters.values())
    return StepMeasurement(
        dict(count.peak_bytes), count.flops * made / micro, trained, size, states
    )


def make_fake_context(
    run: RunConfig,
    family: ModelFamily,
    sketch: ModelSpec,
    feed: BatchShape,
    net: TrainState,
    plan: TrainSchedule,
    count: MemoryTrackerMode,
) -> TrainerContext:
    facts = sketch.constants
    width, height = (side // facts.stride_px for side in feed.size_px)
    names = tuple(str(number) for number in range(feed.samples))

    def batch(number: int) -> Batch:
        count.mark_forward_start()
        latents = torch.empty(feed.samples, facts.latent_channels, height, width)
        rows = torch.empty(feed.samples, feed.text_rows, facts.text_width, dtype=sketch.text_dtype)
        return Batch(latents, TextBatch(rows, (feed.text_rows,) * feed.samples), names, names)

    tokens = feed.size_px[0] * feed.size_px[1] // facts.token_px**2
    return TrainerContext(
        family=family,
        transformer=net.transformer,
        device=cpu_planning_device(run.model),
        optimizer=net.optimizer,
        optimizer_step=net.optimizer_step,
        ema=net.ema,
        schedule=plan,
        seed=run.training.seed,
        flow_options=run.flow,
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
    )
