"""The train state: a network, its trainable parameters, the optimizer and the moving average."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from simpletuner.adapters import attachment
from simpletuner.adapters.factor_copies import AdapterCopies
from simpletuner.adapters.lycoris_targets import choose_lycoris_modules
from simpletuner.config.deepspeed_config import uses_deepspeed
from simpletuner.config.lycoris_config import describe_adapter, require_lycoris_config
from simpletuner.config.schema import OptimizerOptions, RunConfig
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.models.block_executor import block_memory_policy
from simpletuner.models.family import ModelFamily
from simpletuner.training import optimizers
from simpletuner.training.compiler_import import avoid_compiler_import
from simpletuner.training.device import DTYPES, ComputeDevice
from simpletuner.training.ema import Ema, resolve_ema_device
from simpletuner.training.optimizer_step import OptimizerStep, optimizer_step_name
from simpletuner.training.parameter_groups import rate_factors
from simpletuner.training.prepare import PreparedInputs
from simpletuner.training.sharding import Sharding, require_equal_passes
from simpletuner.training.world import World

# A context in which the network has the averaged weights; afterwards the trained ones are back.
AveragedWeights = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class TrainState:
    """The network with its trainable parameters, and the objects that change them.

    trainable_parameters: by name; those of the LoRA, or nearly all of the network; in a sharded
    full fine-tuning this process's rows of them. optimizer_options: with learning_rate already
    multiplied as lr_scale asks. adapter_copies: the LoRA's factors in the dtype of the products; of
    no module where there are none.
    """

    transformer: nn.Module
    trainable_parameters: dict[str, nn.Parameter]
    uses_lora: bool
    optimizer_options: OptimizerOptions
    optimizer: Optimizer
    optimizer_step: OptimizerStep
    ema: Ema | None
    sharding: Sharding
    adapter_copies: AdapterCopies

    @property
    def averaged_weights(self) -> AveragedWeights | None:
        return None if self.ema is None else self.ema.swapped_weights

    def set_lora_strength(self, strength: float) -> None:
        """Multiply the LoRA's delta by `strength`; a network without a LoRA does not change."""
        if self.uses_lora:
            attachment.set_strength(self.transformer, strength)


def build_train_state(
    run: RunConfig,
    prepared: PreparedInputs,
    device: ComputeDevice,
    world: World,
    micro_batches: int,
    emit: Emit,
    closing: ExitStack,
) -> TrainState:
    """Load the network, attach what is trained, place the blocks, and build the optimizer.

    micro_batches: of one optimizer step, over all processes. closing: receives what must be
    released after the training.
    """
    if run.model.dynamo_backend in ("auto", "no"):
        avoid_compiler_import()
    sharding = make_sharding(run, world)
    closing.callback(sharding.close)
    require_equal_passes(sharding, micro_batches)
    # A model with swapped blocks, or one that is sharded, need not fit on the device even once, so
    # it is loaded on the host.
    stays_on_host = run.model.musubi_blocks_to_swap or sharding.is_sharded
    load_device = torch.device("cpu") if stays_on_host else device.device
    transformer = prepared.family.load_transformer(
        prepared.model_files,
        load_device,
        device.weights_dtype,
        run.model,
        emit,
        as_views=sharding.is_sharded,
    )
    trainable = attach_trainable_parameters(run, prepared.family, transformer, emit)
    units = prepared.family.shard_units(transformer)
    trainable = sharding.shard(transformer, units, trainable, device.device)
    configure_blocks(run, prepared.family, transformer, device.device, sharding.is_sharded)
    prepared.family.compile_blocks(transformer, run.model)
    if run.optimizer.optimizer_cpu_offload_method != "none" and device.device.type != "cuda":
        emit(
            NoticeIssued(
                "optimizer_cpu_offload_method has no effect: "
                f"the memory of {device.device.type} is the host's memory"
            )
        )
    return assemble_train_state(run, transformer, trainable, sharding, micro_batches)


def make_sharding(run: RunConfig, world: World) -> Sharding:
    """Return the layout of the network over the ranks that the options ask for."""
    if uses_deepspeed(run):
        from simpletuner.training.zero import Zero  # DeepSpeed may not be installed

        return Zero(run, world)
    trains_adapter = run.model.model_type == "lora"
    if not run.distributed.fsdp_enable or world.size == 1:
        return Sharding(world, trains_adapter, run.optimizer)
    from simpletuner.training.fsdp import Fsdp  # importing FSDP2 takes a second

    reshard = run.distributed.fsdp_reshard_after_forward
    return Fsdp(world, trains_adapter, run.optimizer, reshard)


def configure_blocks(
    run: RunConfig,
    family: ModelFamily,
    transformer: nn.Module,
    device: torch.device,
    is_sharded: bool = False,
) -> None:
    """Set up checkpointing and swapping of the blocks, on this device."""
    streamed = streams_approximator(run, device.type, is_sharded)
    memory = block_memory_policy(run.model, family.block_count(transformer), streamed)
    family.place_blocks(transformer, memory, device)


def streams_approximator(run: RunConfig, device_kind: str, is_sharded: bool) -> bool:
    """Return whether Chroma's approximator is on the device only while a chunk is prepared.

    A sharded network divides them among the processes and gathers them in each pass. Rollouts need
    sigmas that are known only when their batch is loaded.
    """
    rolls_out = run.flow.scheduled_sampling_probability > 0
    return device_kind == "cuda" and not is_sharded and not rolls_out


def attach_trainable_parameters(
    run: RunConfig, family: ModelFamily, transformer: nn.Module, emit: Emit
) -> dict[str, nn.Parameter]:
    """Return what is trained, by name: the parameters of a new adapter, or the network's own."""
    if run.model.model_type == "lora":
        return _attach_lora(run, family, transformer, emit)
    trainable = dict(family.full_finetune_parameters(transformer))
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    count = sum(parameter.numel() for parameter in trainable.values())
    emit(NoticeIssued(f"full fine-tuning: {count / 1e6:.1f} M parameters are trained"))
    return trainable


def assemble_train_state(
    run: RunConfig,
    transformer: nn.Module,
    trainable: dict[str, nn.Parameter],
    sharding: Sharding,
    micro_batches: int,
) -> TrainState:
    """Build the optimizer, its step strategy and the average for the trainable parameters."""
    # Over all processes, because lr_scale counts the samples of a step.
    samples = run.training.train_batch_size * micro_batches
    rate = optimizers.effective_learning_rate(run.optimizer, samples)
    options = run.optimizer.model_copy(update={"learning_rate": rate})
    named, parameters = list(trainable.items()), list(trainable.values())
    factors = rate_factors(options, transformer, trainable)
    optimizer = optimizers.build_optimizer(options, named, run.training.seed, factors)
    step_name = optimizer_step_name(options, parameters[0].device)
    gradient_sum = sharding.gradient_sum(parameters, micro_batches)
    return TrainState(
        transformer,
        trainable,
        run.model.model_type == "lora",
        options,
        optimizer,
        sharding.optimizer_step(step_name, parameters, optimizer, options, gradient_sum),
        make_ema(run, named, sharding),
        sharding,
        AdapterCopies(
            transformer if sharding.adapters_are_whole else nn.Module(),
            DTYPES[run.model.mixed_precision],
        ),
    )


def make_ema(
    run: RunConfig, named: list[tuple[str, nn.Parameter]], sharding: Sharding
) -> Ema | None:
    """Return the moving average, if the options ask for one, on the device that they choose."""
    if not run.optimizer.use_ema:
        return None
    place = resolve_ema_device(run.optimizer, run.model.model_type == "lora")
    options = run.optimizer.model_copy(update={"ema_device": place})
    return Ema(named, options, sharding.whole_params)


def _attach_lora(
    run: RunConfig, family: ModelFamily, transformer: nn.Module, emit: Emit
) -> dict[str, nn.Parameter]:
    options = run.adapter
    settings = None
    if options.lora_type == "lycoris":
        lycoris = require_lycoris_config(options)
        if lycoris.preset is not None:
            classes = family.linear_classes(transformer)
            settings = choose_lycoris_modules(lycoris, lycoris.preset, classes)
    names = (
        list(settings)
        if settings is not None
        else family.lora_targets(transformer, options.flux_lora_target, options.lora_target_modules)
    )
    attached = attachment.attach_adapter(
        transformer,
        options,
        names,
        run.training.seed,
        family.lora_conventions.names,
        lycoris_settings=settings,
    )
    modules = "1 module" if attached.modules == 1 else f"{attached.modules} modules"
    emit(
        NoticeIssued(
            f"{describe_adapter(options)} on {modules}: {attached.parameters / 1e6:.2f} M "
            f"parameters, effective scale {attached.scale:g} (alpha / rank)"
        )
    )
    if options.init_lora and attached.initialized_from:
        name = Path(options.init_lora).name
        emit(NoticeIssued(f"initialised from {name}: {attached.initialized_from}"))
    return dict(attached.trainable)
