"""What is trained: a network, its trainable part, the optimizer and the average."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from simpletuner.adapters import attachment
from simpletuner.config.lycoris_config import describe_adapter
from simpletuner.config.schema import OptimizerOptions, RunConfig
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.models.block_executor import block_memory_policy
from simpletuner.models.family import ModelFamily
from simpletuner.training import lr_schedule, optimizers
from simpletuner.training.device import ComputeDevice
from simpletuner.training.ema import Ema
from simpletuner.training.optimizer_step import OptimizerStep, make_optimizer_step
from simpletuner.training.prepare import PreparedInputs

AveragedWeights = Callable[
    [], AbstractContextManager[None]
]  # the averaged weights inside, the trained ones after


@dataclass(frozen=True)
class TrainState:
    """trained: name -> parameter, LoRA's or nearly all of the network's own.

    schedule: the optimizer's options with learning_rate as lr_scale makes it.
    """

    transformer: nn.Module
    trainable_parameters: dict[str, nn.Parameter]
    uses_lora: bool
    optimizer_options: OptimizerOptions
    optimizer: Optimizer
    optimizer_step: OptimizerStep
    ema: Ema | None

    @property
    def averaged_weights(self) -> AveragedWeights | None:
        return None if self.ema is None else self.ema.swapped_weights

    def set_lora_strength(self, strength: float) -> None:
        """Of the LoRA; a network without one stays as it is."""
        if self.uses_lora:
            attachment.set_strength(self.transformer, strength)


def build_train_state(
    run: RunConfig, prepared: PreparedInputs, device: ComputeDevice, emit: Emit
) -> TrainState:
    # What is to be swapped need not fit the device even once.
    at = torch.device("cpu") if run.model.musubi_blocks_to_swap else device.device
    transformer = prepared.family.load_transformer(
        prepared.model_files, at, device.weights_dtype, run.model, emit
    )
    trained = attach_trainable_parameters(run, prepared.family, transformer, emit)
    configure_blocks(run, prepared.family, transformer, device.device)
    prepared.family.compile_blocks(transformer, run.model)
    if run.optimizer.optimizer_cpu_offload_method != "none" and device.device.type != "cuda":
        emit(
            NoticeIssued(
                f"optimizer states stay where they are: {device.device.type} has the host's memory"
            )
        )
    return assemble_train_state(run, transformer, trained)


def configure_blocks(
    run: RunConfig, family: ModelFamily, transformer: nn.Module, device: torch.device | None = None
) -> None:
    """How the blocks are run; the memory plan does the same to a network without weights or device."""
    family.place_blocks(
        transformer, block_memory_policy(run.model, family.block_count(transformer)), device
    )


def attach_trainable_parameters(
    run: RunConfig, family: ModelFamily, transformer: nn.Module, emit: Emit
) -> dict[str, nn.Parameter]:
    """What is trained, by name: a fresh LoRA's parameters, or the network's own."""
    if run.model.model_type == "lora":
        return _attach_lora(run, family, transformer, emit)
    trained = dict(family.full_finetune_parameters(transformer))
    for parameter in trained.values():
        parameter.requires_grad_(True)
    count = sum(parameter.numel() for parameter in trained.values())
    emit(NoticeIssued(f"full rank: {count / 1e6:.1f} M parameters are trained"))
    return trained


def assemble_train_state(
    run: RunConfig, transformer: nn.Module, trained: dict[str, nn.Parameter]
) -> TrainState:
    """Optimizer and average for what is trained."""
    samples = run.training.train_batch_size * run.training.gradient_accumulation_steps
    rate = lr_schedule.effective_learning_rate(run.optimizer, samples)
    schedule = run.optimizer.model_copy(update={"learning_rate": rate})
    named = list(trained.items())
    optimizer = optimizers.build_optimizer(schedule, named, run.training.seed)
    update = make_optimizer_step(list(trained.values()), optimizer, schedule)
    ema = Ema(named, run.optimizer) if run.optimizer.use_ema else None
    return TrainState(
        transformer, trained, run.model.model_type == "lora", schedule, optimizer, update, ema
    )


def _attach_lora(
    run: RunConfig, family: ModelFamily, transformer: nn.Module, emit: Emit
) -> dict[str, nn.Parameter]:
    options = run.adapter
    names = family.lora_targets(transformer, options.flux_lora_target, options.lora_target_modules)
    attached = attachment.attach_adapter(transformer, options, names, run.training.seed)
    emit(
        NoticeIssued(
            f"{describe_adapter(options)} on {attached.modules} modules: "
            f"{attached.parameters / 1e6:.2f} M parameters, effective scale {attached.scale:g} (alpha / rank)"
        )
    )
    if options.init_lora and attached.initialized_from:
        emit(
            NoticeIssued(
                f"goes on from {Path(options.init_lora).name}: {attached.initialized_from}"
            )
        )
    return dict(attached.trainable)
