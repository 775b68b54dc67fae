"""From a configuration to the parts of the loop. The only place of the engine that sees the whole config."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from threading import Lock

from simpletuner import __version__
from simpletuner.config.compare import training_name
from simpletuner.config.load import resolved
from simpletuner.config.schema import RunConfig
from simpletuner.data.backends import Backends
from simpletuner.data.order import Order
from simpletuner.data.types import MicroBatch
from simpletuner.events.types import Emit, Noted, Resumed, RunStarted, Warned
from simpletuner.models import registry
from simpletuner.training import resume, schedules, trainee
from simpletuner.training.device import Device, choose
from simpletuner.training.export import Exporter
from simpletuner.training.keeper import Keeper
from simpletuner.training.loop import Action, Every, Parts, Plan
from simpletuner.training.metadata import Describer, public_name
from simpletuner.training.prefetch import Prefetch
from simpletuner.training.prepare import Prepared, prepare
from simpletuner.training.publish import Publisher, Publishing, repository
from simpletuner.training.resume import Origin
from simpletuner.training.rundir import RunFolder
from simpletuner.training.stages import Evaluation, Pictures, Scoring, heldout_of
from simpletuner.training.trainee import Trainee
from simpletuner.validation import prompts as validation_prompts
from simpletuner.validation import scores
from simpletuner.validation.component import Validator
from simpletuner.validation.heldout import HeldOut
from simpletuner.validation.images import Settings
from simpletuner.validation.inference import Inference


def build(
    run: RunConfig, backends: Backends, base_dir: Path, folder: RunFolder, stop_requested: Callable[[], bool],
    emit: Emit, closing: ExitStack,
) -> Parts:  # fmt: skip
    """base_dir: folder of the config file, where relative paths are looked up first.

    Another training's run folder is refused before anything is encoded or loaded, and left as it was.
    closing: gets whatever must be closed after the training.
    """
    config = resolved(run)
    origin = resume.find(folder.path, run.checkpoint.resume_from_checkpoint, emit)
    if origin is None:
        folder.write_config(config)
    else:
        origin.compare_config(config, emit)
    device, family = choose(run.model), registry.family(run.model.model_family)
    for note in family.notes(run.model):
        emit(Noted(note))
    validated = not run.validation.validation_disable
    prompts = validation_prompts.read_prompts(run.validation, base_dir) if validated else ()
    guidance = run.validation.validation_guidance_real
    metrics = scores.chosen(run.validation)
    texts = (*validation_prompts.captions(prompts, guidance), *scores.texts(metrics, guidance))
    prepared = prepare(run, backends, family, texts, folder, device, emit, closing)
    seed, size = run.training.seed, run.training.train_batch_size
    order = Order(prepared.train.placed, prepared.train_sets, seed, size, run.data)
    for note in order.notes:
        emit(Warned(note))
    plan = plan_of(run, order.batches_per_epoch)
    net = trainee.make(run, prepared, device, emit)

    inference = Inference(family, prepared.facts, device.device, device.weights, device.autocast)
    heldout = heldout_of(run, prepared, inference)
    evaluation = None if heldout is None else Evaluation(heldout, net, folder.path, emit)
    pictures = pictures_of(run, prepared, inference, net, prompts, plan, folder, emit)
    scoring = scoring_of(run, prepared, inference, net, metrics, emit)
    remembering: dict[str, HeldOut | scores.Scorer] = {"heldout": evaluation.heldout} if evaluation else {}
    if scoring is not None:
        remembering["scores"] = scoring.scorer
    described = Describer(
        run, family.name, prepared.source.name, prepared.train.placed,
        [prompt for one in backends.train for prompt in one.instance_prompts], plan.epoch, folder.path,
    )  # fmt: skip
    exporter = Exporter(family, net, run, folder, emit, described.fields)
    publishing = publishing_of(run, described, stop_requested, emit, closing)
    keeper = Keeper(
        folder, run.checkpoint, net, config, prepared.identity(), remembering, exporter.into_checkpoint,
        evaluation.best_step if evaluation else lambda: None, emit,
    )  # fmt: skip
    if origin is not None:
        keeper.restore(origin)
        folder.write_config(config)
    model = f"{run.model.model_family} {prepared.source.name}"
    first = begin(origin, folder, model, device, plan, emit)
    batch, sizes = batches_of(run, prepared, order, plan, closing)

    def asked() -> list[Action]:
        offered = {"save": keeper.save, **({"validate": pictures.draw} if pictures else {})}
        return [action for name, action in offered.items() if folder.take_control(name)]

    return Parts(
        family, net.transformer, device, net.optimizer, net.update, net.ema, plan,
        run.training.seed, run.flow, run.adapter.lora_dropout > 0 and net.uses_lora,
        lambda step: schedules.learning_rate(net.schedule, step, plan.total_steps),
        batch, sizes, first, keeper.save,
        every(run, plan, keeper, pictures, evaluation, scoring, exporter, publishing, emit), asked,
        stop_requested, emit,
    )  # fmt: skip


def begin(
    origin: Origin | None, folder: RunFolder, model: str, device: Device, plan: Plan, emit: Emit
) -> int:
    """Tell where the run begins; returns the steps that are behind."""
    first = 0 if origin is None else origin.step
    emit(RunStarted(__version__, str(folder.path), model, str(device), plan.total_steps, first))
    if origin is not None:
        emit(Resumed(first, origin.folder.name))
        if first >= plan.total_steps:
            emit(Noted(f"all {plan.total_steps} steps are done; a larger max_train_steps would go on"))
    return first


def plan_of(run: RunConfig, batches_per_epoch: int) -> Plan:
    """Steps or epochs, whichever is given; the config sees to it that one is."""
    training = run.training
    accumulation, patience = training.gradient_accumulation_steps, training.nonfinite_loss_patience
    epochs = (training.num_train_epochs or 1) * batches_per_epoch / accumulation
    steps = training.max_train_steps or math.ceil(epochs)
    return Plan(steps, accumulation, batches_per_epoch, patience)


def batches_of(
    run: RunConfig, prepared: Prepared, order: Order, plan: Plan, closing: ExitStack
) -> tuple[Prefetch, Callable[[int], tuple[int, int]]]:
    """Micro-batches by number, loaded ahead, and their sizes as Parts wants them."""
    alone = Lock()  # the loop and the loading thread ask for different numbers at the same time

    @lru_cache(64)
    def micro(number: int) -> MicroBatch:
        with alone:
            return order.micro_batch(number)

    def sizes(number: int) -> tuple[int, int]:
        visits = micro(number).visits
        width, height = prepared.train.placed[visits[0].index].bucket_px
        return len(visits), width * height // prepared.facts.token_px**2

    batches = prepared.batches(prepared.train, run.cache.vae_cache_sample, run.training.seed)
    last = plan.total_steps * plan.accumulation - 1
    prefetch = Prefetch(lambda number: batches.load(micro(number)), last)
    closing.callback(prefetch.close)
    return prefetch, sizes


def pictures_of(
    run: RunConfig, prepared: Prepared, inference: Inference, net: Trainee,
    prompts: tuple[validation_prompts.Prompt, ...], plan: Plan, folder: RunFolder, emit: Emit,
) -> Pictures | None:  # fmt: skip
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
        public_name(prepared.source.name),  # pictures are published
        prepared.name() + training_name(resolved(run)),
    )
    decoder = prepared.decoder(run.model, inference.device)
    chosen = options.validation_strengths.split(",") if net.uses_lora else ["none"]
    strengths = tuple(float(strength) for strength in chosen if strength != "none")
    validator = Validator(inference, drawn, settings, prepared.rows, decoder, folder.path, emit, strengths)
    return Pictures(validator, net, run.optimizer.ema_validation, plan.total_steps)


def scoring_of(
    run: RunConfig, prepared: Prepared, inference: Inference, net: Trainee,
    metrics: tuple[scores.Metric, ...], emit: Emit,
) -> Scoring | None:  # fmt: skip
    """The stage that scores; None where no score is asked for."""
    if not metrics:
        return None
    options = run.validation
    scorer = scores.Scorer(
        inference, metrics, options.validation_num_inference_steps, options.validation_guidance_real,
        prepared.rows, prepared.decoder(run.model, inference.device), emit,
    )  # fmt: skip
    return Scoring(scorer, net)


def publishing_of(
    run: RunConfig, described: Describer, stop_requested: Callable[[], bool], emit: Emit, closing: ExitStack
) -> Publishing:
    """The stage that writes the card, and uploads where that is asked for."""
    options, folder = run.publishing, described.run_dir
    if not options.push_to_hub:
        return Publishing(described, None, stop_requested)
    publisher = Publisher(folder, repository(options, folder), options.model_card_private, emit)
    closing.callback(publisher.close)
    return Publishing(described, publisher, stop_requested)


def every(
    run: RunConfig, plan: Plan, keeper: Keeper, pictures: Pictures | None, evaluation: Evaluation | None,
    scoring: Scoring | None, exporter: Exporter, publishing: Publishing, emit: Emit,
) -> tuple[Every, ...]:  # fmt: skip
    """Between steps, in order: evaluate (it names the best), score, save, draw, and at the end export."""

    def steps(interval: int) -> Callable[[int], int]:
        return lambda step: step // interval

    rows = []
    saving = run.checkpoint.checkpoint_step_interval
    if evaluation is not None:
        measuring = run.validation.eval_steps_interval or saving
        if measuring % saving:
            what = f"checkpoint_step_interval {saving} does not divide eval_steps_interval {measuring}"
            emit(Warned(f"{what}: the step with the lowest held-out loss may have no checkpoint"))
        rows.append(Every(steps(measuring), evaluation.run, at_start=True))
    benchmark = not run.validation.disable_benchmark
    if scoring is not None:
        interval = run.validation.evaluation_step_interval or plan.total_steps
        rows.append(Every(steps(interval), scoring.run, at_start=benchmark))
    rows.append(Every(steps(saving), keeper.save))
    epochs = run.checkpoint.checkpoint_epoch_interval
    if epochs is not None:
        rows.append(Every(lambda step: plan.epoch(step) // epochs, keeper.save))
    if run.publishing.push_checkpoints_to_hub:
        rows.append(Every(steps(saving), publishing.checkpoint))
    if pictures is not None:
        drawn = steps(run.validation.validation_step_interval)
        rows.append(Every(drawn, pictures.draw, at_start=benchmark))
    rows.append(Every(lambda step: 0, exporter.finish))
    rows.append(Every(lambda step: 0, publishing.finish))
    if evaluation is not None:
        rows.append(Every(lambda step: 0, evaluation.conclude))
    return tuple(rows)
