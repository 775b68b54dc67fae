"""From a configuration to the parts of the loop. The only place of the engine that sees the whole config."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from simpletuner import __version__
from simpletuner.adapters import lora
from simpletuner.config.compare import training_name
from simpletuner.config.load import resolved
from simpletuner.config.schema import RunConfig
from simpletuner.data.backends import Backends
from simpletuner.data.order import Order
from simpletuner.events.types import Emit, Noted, RunStarted, Warned
from simpletuner.models import registry
from simpletuner.training import optimizers, schedules
from simpletuner.training.device import Device, choose
from simpletuner.training.ema import Ema
from simpletuner.training.export import Exporter
from simpletuner.training.keeper import Keeper
from simpletuner.training.loop import Every, Parts, Plan
from simpletuner.training.prefetch import Prefetch
from simpletuner.training.prepare import Prepared, prepare
from simpletuner.training.rundir import RunFolder
from simpletuner.training.stages import Average, Evaluation, Pictures, heldout_of
from simpletuner.validation import prompts as validation_prompts
from simpletuner.validation.component import Validator
from simpletuner.validation.images import Settings
from simpletuner.validation.inference import Inference


@dataclass(frozen=True)
class Built:
    """The parts, and what must be closed after them."""

    parts: Parts
    close: Callable[[], None]


def build(
    run: RunConfig,
    backends: Backends,
    base_dir: Path,
    folder: RunFolder,
    stop_requested: Callable[[], bool],
    emit: Emit,
) -> Built:
    """base_dir: folder of the config file, where relative paths are looked up first."""
    device = choose(run.model)
    family = registry.family(run.model.model_family)
    for note in family.notes(run.model):
        emit(Noted(note))
    prompts = (
        () if run.validation.validation_disable else validation_prompts.read_prompts(run.validation, base_dir)
    )
    texts = validation_prompts.captions(prompts, run.validation.validation_guidance_real)
    prepared = prepare(run, backends, family, texts, folder, device, emit)

    order = Order(
        prepared.train.placed, prepared.train_sets, run.training.seed, run.training.train_batch_size, run.data
    )
    for note in order.notes:
        emit(Warned(note))
    plan = plan_of(run, order.batches_per_epoch)
    transformer, trained, uses_lora = network(run, prepared, device, emit)
    base_rate = schedules.effective_learning_rate(
        run.optimizer, run.training.train_batch_size * run.training.gradient_accumulation_steps
    )
    scheduled = run.optimizer.model_copy(update={"learning_rate": base_rate})
    named = list(trained.items())
    optimizer = optimizers.build(scheduled, named, run.training.seed)
    ema = Ema(named, run.optimizer) if run.optimizer.use_ema else None
    average = None if ema is None else ema.swapped

    inference = Inference(family, prepared.facts, device.device, device.weights, device.autocast)
    weights = lora.set_strength if uses_lora else None
    heldout = heldout_of(run, prepared, inference)
    evaluation = Evaluation(heldout, transformer, average, emit) if heldout else None
    pictures = pictures_of(
        run, prepared, inference, transformer, average, weights, prompts, folder, device, emit
    )
    exporter = Exporter(family, prepared.source, transformer, run, average, folder, uses_lora, emit)
    keeper = Keeper(
        folder, run.checkpoint, trained, optimizer, ema, resolved(run), prepared.identity(),
        {"heldout": (heldout.state_dict, heldout.load_state_dict)} if heldout else {},
        exporter.into_checkpoint, evaluation.best_step if evaluation else lambda: None, emit,
    )  # fmt: skip
    batches = prepared.batches(prepared.train, run.cache.vae_cache_sample, run.training.seed)
    micro = cache(order.micro_batch) if order.batches_per_epoch <= 100_000 else order.micro_batch
    last = plan.total_steps * plan.accumulation - 1
    prefetch = Prefetch(lambda number: batches.load(micro(number)), last)
    emit(
        RunStarted(
            __version__, str(folder.path), f"{run.model.model_family} {prepared.source.name}", str(device),
            plan.total_steps, 0,
        )
    )  # fmt: skip

    def sizes(number: int) -> tuple[int, int]:
        visits = micro(number).visits
        width, height = prepared.train.placed[visits[0].index].bucket_px
        return len(visits), width * height // prepared.facts.token_px**2

    def attend(step: int) -> None:
        if folder.take_control("save"):
            keeper.save(step)
        if folder.take_control("validate") and pictures is not None:
            pictures.draw(step)

    parts = Parts(
        family, transformer, device, named, optimizer, ema, plan, run.training.seed,
        run.flow, run.optimizer, run.adapter.lora_dropout > 0 and uses_lora,
        lambda step: schedules.learning_rate(scheduled, step, plan.total_steps),
        prefetch, sizes, keeper.resume, keeper.save,
        every(run, plan, keeper, pictures, evaluation, exporter),
        lambda: stop_requested() or folder.take_control("stop"), attend, emit,
    )  # fmt: skip

    def close() -> None:
        prefetch.close()
        prepared.latents.close()
        prepared.text.close()

    return Built(parts, close)


def plan_of(run: RunConfig, batches_per_epoch: int) -> Plan:
    """Steps or epochs, whichever is given; the config sees to it that one is."""
    training = run.training
    per_epoch = batches_per_epoch / training.gradient_accumulation_steps
    steps = training.max_train_steps or math.ceil((training.num_train_epochs or 1) * per_epoch)
    return Plan(
        steps,
        training.gradient_accumulation_steps,
        batches_per_epoch,
        training.nonfinite_loss_patience,
    )


def network(
    run: RunConfig, prepared: Prepared, device: Device, emit: Emit
) -> tuple[nn.Module, dict[str, nn.Parameter], bool]:
    """The transformer with what is trained in it: LoRA parameters, or nearly all of its own."""
    family = prepared.family
    transformer = family.load_transformer(prepared.source, device.device, device.weights)
    if run.model.gradient_checkpointing:
        family.set_gradient_checkpointing(transformer, run.model.gradient_checkpointing_interval or 1)
    if run.model.model_type == "full":
        trained = dict(family.trainable_at_full_rank(transformer))
        for parameter in trained.values():
            parameter.requires_grad_(True)
        emit(
            Noted(f"full rank: {sum(p.numel() for p in trained.values()) / 1e6:.1f} M parameters are trained")
        )
        return transformer, trained, False
    options = run.adapter
    names = family.lora_targets(transformer, options.flux_lora_target, options.lora_target_modules)
    attached = lora.attach(transformer, run.adapter, names, run.training.seed)
    emit(
        Noted(
            f"LoRA on {attached.modules} modules, rank {run.adapter.lora_rank}: "
            f"{attached.parameters / 1e6:.2f} M parameters, effective scale {attached.scale:g} (alpha / rank)"
        )
    )
    return transformer, dict(attached.trainable), True


def pictures_of(
    run: RunConfig,
    prepared: Prepared,
    inference: Inference,
    transformer: nn.Module,
    average: Average | None,
    set_strength: Callable[[nn.Module, float], None] | None,
    prompts: tuple[validation_prompts.Prompt, ...],
    folder: RunFolder,
    device: Device,
    emit: Emit,
) -> Pictures | None:
    """The stage that draws; None when there is nothing to draw."""
    if not prompts:
        return None
    options = run.validation
    sizes, notes = validation_prompts.read_sizes(
        options.validation_resolution, run.data, prepared.facts.alignment_px
    )
    for note in notes:
        emit(Noted(note))
    seed = run.training.seed if options.validation_seed is None else options.validation_seed
    drawn = validation_prompts.pictures(prompts, sizes, options.num_validation_images, seed)
    settings = Settings(
        options.validation_num_inference_steps,
        options.validation_guidance_real,
        prepared.source.name,
        prepared.name() + training_name(resolved(run)),
    )
    vae = cache(lambda: prepared.family.load_vae(prepared.source, run.model, device.device))

    def decode(latents: Tensor) -> Tensor:
        return vae().decode(latents)

    validator = Validator(inference, drawn, settings, prepared.rows, decode, folder.path, emit)
    return Pictures(validator, transformer, average, run.optimizer.ema_validation, set_strength)


def every(
    run: RunConfig,
    plan: Plan,
    keeper: Keeper,
    pictures: Pictures | None,
    evaluation: Evaluation | None,
    exporter: Exporter,
) -> tuple[Every, ...]:
    """Between steps, in order: evaluate (it names the best), save, draw, and at the end export."""
    per_epoch = math.ceil(plan.batches_per_epoch / plan.accumulation)
    rows = []
    if evaluation is not None:
        interval = run.validation.eval_steps_interval or run.checkpoint.checkpoint_step_interval
        rows.append(Every(interval, evaluation.run, at_start=True))
    rows.append(Every(run.checkpoint.checkpoint_step_interval, keeper.save))
    if run.checkpoint.checkpoint_epoch_interval is not None:
        rows.append(Every(run.checkpoint.checkpoint_epoch_interval * per_epoch, keeper.save, at_end=False))
    if pictures is not None:
        first = not run.validation.disable_benchmark
        rows.append(Every(run.validation.validation_step_interval, pictures.draw, at_start=first))
    rows.append(Every(None, exporter.finish))
    return tuple(rows)
