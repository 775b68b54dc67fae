"""One whole training step of the configured size on tensors without contents: no weights, no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simpletuner.cache.types import Batch, TextBatch
from simpletuner.config.schema import ModelOptions, RunConfig
from simpletuner.events.sinks import silent
from simpletuner.models.family import BlockMemory, ModelFamily, Sketch
from simpletuner.training import loop, trainee
from simpletuner.training.device import Device, choose
from simpletuner.training.loop import Parts, Plan
from simpletuner.training.plan.count import LiveBytes
from simpletuner.training.trainee import Trainee

MICRO_BATCHES = 2  # the second finds the gradients of the first; a third would find nothing new


@dataclass(frozen=True)
class Feed:
    """What a micro-batch is: samples of one size (width, height), each with as many text rows."""

    samples: int
    size_px: tuple[int, int]
    text_rows: int


@dataclass(frozen=True)
class Measured:
    """Of one optimizer step. peak: bytes by part at the highest moment. flops: of all its micro-batches.

    trained, trained_bytes: parameters that are trained. optimizer: bytes of its states.
    """

    peak: dict[str, int]
    flops: float
    trained: int
    trained_bytes: int
    optimizer: int


def measure(
    run: RunConfig, family: ModelFamily, sketch: Sketch, memory: BlockMemory, feed: Feed, granule: int
) -> Measured:
    """Attach, equip and step as a run does, on the sketch's network, which is used up.

    Of `memory`, what is recomputed; nothing waits on the host. The moving average is left out.

    The adapter is attached on the meta device, where the network is; the rest runs on fake tensors of the
    CPU: those of CUDA abort where there is none, and on meta attention keeps all S x S scores.
    """
    network = sketch.transformer
    with torch.random.fork_rng(devices=[]):
        trained = {id(parameter) for parameter in trainee.attach(run, family, network, silent).values()}
        part = "adapters" if run.model.model_type == "lora" else "weights"
        family.arrange(network, BlockMemory(memory.checkpointed, memory.interval), None)
        count = LiveBytes(granule)
        with FakeTensorMode(allow_non_fake_inputs=True), count:
            named = materialise(network, trained, part, count)
            count.part = "optimizer"
            net = trainee.equip(without_average(run), network, named)
            make_states(net)
            return measure_step(run, family, sketch, feed, net, count)


def stand_in(options: ModelOptions) -> Device:
    """The CPU in the run's number formats, whatever else the options ask of a GPU."""
    plain = {"device": "cpu", "musubi_blocks_to_swap": 0.0, "gradient_checkpointing_backend": "torch"}
    return choose(options.model_copy(update=plain))


def without_average(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"use_ema": False})})


def materialise(
    network: nn.Module, trained: set[int], part: str, count: LiveBytes
) -> dict[str, nn.Parameter]:
    """Tensors in place of the meta device's (Module.to refuses); those that are trained, by name.

    part: what those are counted as.
    """
    named: dict[str, nn.Parameter] = {}
    for prefix, module in network.named_modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                is_trained = id(tensor) in trained
                count.part = part if is_trained else "weights"
                fresh = nn.Parameter(_empty(tensor), requires_grad=tensor.requires_grad)
                module._parameters[name] = fresh
                if is_trained:
                    named[f"{prefix}.{name}"] = fresh
        count.part = "weights"
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _empty(buffer)
    return named


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def make_states(net: Trainee) -> None:
    """A first optimizer step: its states are there from the second training step on."""
    for parameter in net.trained.values():
        parameter.grad = torch.empty_like(parameter)
    net.optimizer.step()
    net.optimizer.zero_grad(set_to_none=True)


def measure_step(
    run: RunConfig, family: ModelFamily, sketch: Sketch, feed: Feed, net: Trainee, count: LiveBytes
) -> Measured:
    """The loop's own step, counted."""
    made = run.training.gradient_accumulation_steps
    micro = min(made, MICRO_BATCHES)
    states = count.live["optimizer"]
    parts = parts_of(run, family, sketch, feed, net, Plan(1, micro, 1, 0), count)
    count.restart()
    with count.step():
        loop.train_step(parts, 0)
    trained = sum(parameter.numel() for parameter in net.trained.values())
    size = sum(parameter.nbytes for parameter in net.trained.values())
    return Measured(dict(count.peak), count.flops * made / micro, trained, size, states)


def parts_of(
    run: RunConfig, family: ModelFamily, sketch: Sketch, feed: Feed, net: Trainee, plan: Plan,
    count: LiveBytes,
) -> Parts:  # fmt: skip
    facts = sketch.facts
    width, height = (side // facts.stride_px for side in feed.size_px)
    names = tuple(str(number) for number in range(feed.samples))

    def batch(number: int) -> Batch:
        count.forward_begins()
        latents = torch.empty(feed.samples, facts.latent_channels, height, width)
        rows = torch.empty(feed.samples, feed.text_rows, facts.text_width, dtype=sketch.text_dtype)
        return Batch(latents, TextBatch(rows, (feed.text_rows,) * feed.samples), names, names)

    tokens = feed.size_px[0] * feed.size_px[1] // facts.token_px**2
    return Parts(
        family=family, transformer=net.transformer, device=stand_in(run.model), optimizer=net.optimizer,
        update=net.update, ema=net.ema, plan=plan, seed=run.training.seed, flow=run.flow,
        uses_dropout=run.adapter.lora_dropout > 0 and net.uses_lora,
        learning_rate=lambda step: net.schedule.learning_rate, batch=batch,
        sizes=lambda number: (feed.samples, tokens), resumed_step=0, save=lambda step: None, every=(),
        asked=list, stop_requested=lambda: False, emit=silent,
    )  # fmt: skip
