"""What is trained: a network, its trainable part, the optimizer and the average."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from simpletuner.adapters import lora
from simpletuner.config.lycoris import described
from simpletuner.config.schema import OptimizerOptions, RunConfig
from simpletuner.events.types import Emit, Noted
from simpletuner.models.blocks import block_memory
from simpletuner.models.family import ModelFamily
from simpletuner.training import optimizers, schedules
from simpletuner.training.device import Device
from simpletuner.training.ema import Ema
from simpletuner.training.prepare import Prepared
from simpletuner.training.update import Update, update_of

Average = Callable[[], AbstractContextManager[None]]  # the averaged weights inside, the trained ones after


@dataclass(frozen=True)
class Trainee:
    """trained: name -> parameter, LoRA's or nearly all of the network's own.

    schedule: the optimizer's options with learning_rate as lr_scale makes it.
    """

    transformer: nn.Module
    trained: dict[str, nn.Parameter]
    uses_lora: bool
    schedule: OptimizerOptions
    optimizer: Optimizer
    update: Update
    ema: Ema | None

    @property
    def average(self) -> Average | None:
        return None if self.ema is None else self.ema.swapped

    def set_strength(self, strength: float) -> None:
        """Of the LoRA; a network without one stays as it is."""
        if self.uses_lora:
            lora.set_strength(self.transformer, strength)


def make(run: RunConfig, prepared: Prepared, device: Device, emit: Emit) -> Trainee:
    # What is to be swapped need not fit the device even once.
    at = torch.device("cpu") if run.model.musubi_blocks_to_swap else device.device
    transformer = prepared.family.load_transformer(prepared.source, at, device.weights, run.model, emit)
    trained = attach(run, prepared.family, transformer, emit)
    prepare_blocks(run, prepared.family, transformer, device.device)
    prepared.family.compile_blocks(transformer, run.model)
    if run.optimizer.optimizer_cpu_offload_method != "none" and device.device.type != "cuda":
        emit(Noted(f"optimizer states stay where they are: {device.device.type} has the host's memory"))
    return equip(run, transformer, trained)


def prepare_blocks(
    run: RunConfig, family: ModelFamily, transformer: nn.Module, device: torch.device | None = None
) -> None:
    """How the blocks are run; the memory plan does the same to a network without weights or device."""
    family.arrange(transformer, block_memory(run.model, family.block_count(transformer)), device)


def attach(
    run: RunConfig, family: ModelFamily, transformer: nn.Module, emit: Emit
) -> dict[str, nn.Parameter]:
    """What is trained, by name: a fresh LoRA's parameters, or the network's own."""
    if run.model.model_type == "lora":
        return _lora(run, family, transformer, emit)
    trained = dict(family.trainable_at_full_rank(transformer))
    for parameter in trained.values():
        parameter.requires_grad_(True)
    count = sum(parameter.numel() for parameter in trained.values())
    emit(Noted(f"full rank: {count / 1e6:.1f} M parameters are trained"))
    return trained


def equip(run: RunConfig, transformer: nn.Module, trained: dict[str, nn.Parameter]) -> Trainee:
    """Optimizer and average for what is trained."""
    samples = run.training.train_batch_size * run.training.gradient_accumulation_steps
    rate = schedules.effective_learning_rate(run.optimizer, samples)
    schedule = run.optimizer.model_copy(update={"learning_rate": rate})
    named = list(trained.items())
    optimizer = optimizers.build(schedule, named, run.training.seed)
    update = update_of(list(trained.values()), optimizer, schedule)
    ema = Ema(named, run.optimizer) if run.optimizer.use_ema else None
    return Trainee(transformer, trained, run.model.model_type == "lora", schedule, optimizer, update, ema)


def _lora(run: RunConfig, family: ModelFamily, transformer: nn.Module, emit: Emit) -> dict[str, nn.Parameter]:
    options = run.adapter
    names = family.lora_targets(transformer, options.flux_lora_target, options.lora_target_modules)
    attached = lora.attach(transformer, options, names, run.training.seed)
    emit(
        Noted(
            f"{described(options)} on {attached.modules} modules: "
            f"{attached.parameters / 1e6:.2f} M parameters, effective scale {attached.scale:g} (alpha / rank)"
        )
    )
    if options.init_lora and attached.continued:
        emit(Noted(f"goes on from {Path(options.init_lora).name}: {attached.continued}"))
    return dict(attached.trainable)
