"""From a configuration to the parts of the loop. The only place of the engine that sees the whole config."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from threading import Lock

from simpletuner import __version__
from simpletuner.config.compare_configs import training_config_hash
from simpletuner.config.load import resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_file import DatasetFile
from simpletuner.data.sample_order import SampleOrder
from simpletuner.data.sample_types import MicroBatch
from simpletuner.events.event_types import Emit, NoticeIssued, RunResumed, RunStarted, WarningIssued
from simpletuner.models import registry
from simpletuner.training import lr_schedule, resume, train_state
from simpletuner.training.callbacks import (
    HeldOutLossCallback,
    ImageValidationCallback,
    ScoringCallback,
    build_held_out_evaluator,
)
from simpletuner.training.checkpointer import Checkpointer
from simpletuner.training.device import ComputeDevice, select_device
from simpletuner.training.exporter import Exporter
from simpletuner.training.hub_publisher import HubPublisher, PublishCallback, repository_name
from simpletuner.training.loop import ScheduledCallback, StepCallback, TrainerContext, TrainSchedule
from simpletuner.training.model_metadata import RunMetadata, public_name
from simpletuner.training.prefetch import BatchPrefetcher
from simpletuner.training.prepare import PreparedInputs, prepare_inputs
from simpletuner.training.resume import ResumePoint
from simpletuner.training.run_folder import RunFolder
from simpletuner.training.train_state import TrainState
from simpletuner.validation import image_scoring
from simpletuner.validation import prompts as validation_prompts
from simpletuner.validation.held_out_loss import HeldOutEvaluator
from simpletuner.validation.image_validator import ImageValidator
from simpletuner.validation.inference import Inference
from simpletuner.validation.validation_images import GenerationSettings


def build_trainer_context(
    run: RunConfig,
    backends: DatasetFile,
    base_dir: Path,
    folder: RunFolder,
    stop_requested: Callable[[], bool],
    emit: Emit,
    closing: ExitStack,
) -> TrainerContext:
    """base_dir: folder of the config file, where relative paths are looked up first.

    Another training's run folder is refused before anything is encoded or loaded, and left as it was.
    closing: gets whatever must be closed after the training.
    """
    config = resolved_options(run)
    origin = resume.find_resume_point(folder.path, run.checkpoint.resume_from_checkpoint, emit)
    if origin is None:
        folder.write_config(config)
    else:
        origin.require_same_config(config, emit)
    device, family = select_device(run.model), registry.get_family(run.model.model_family)
    for note in family.notices(run.model):
        emit(NoticeIssued(note))
    validated = not run.validation.validation_disable
    prompts = validation_prompts.read_prompts(run.validation, base_dir) if validated else ()
    guidance = run.validation.validation_guidance_real
    metrics = image_scoring.choose_metrics(run.validation)
    texts = (
        *validation_prompts.prompt_texts(prompts, guidance),
        *image_scoring.metric_texts(metrics, guidance),
    )
    prepared = prepare_inputs(run, backends, family, texts, folder, device, emit, closing)
    seed, size = run.training.seed, run.training.train_batch_size
    order = SampleOrder(prepared.train.placed_samples, prepared.train_sets, seed, size, run.data)
    for note in order.notices:
        emit(WarningIssued(note))
    plan = make_train_schedule(run, order.batches_per_epoch)
    net = train_state.build_train_state(run, prepared, device, emit)

    inference = Inference(
        family, prepared.constants, device.device, device.weights_dtype, device.autocast
    )
    heldout = build_held_out_evaluator(run, prepared, inference)
    evaluation = None if heldout is None else HeldOutLossCallback(heldout, net, folder.path, emit)
    pictures = build_image_validation(run, prepared, inference, net, prompts, plan, folder, emit)
    scoring = build_scoring(run, prepared, inference, net, metrics, emit)
    remembering: dict[str, HeldOutEvaluator | image_scoring.Scorer] = (
        {"heldout": evaluation.evaluator} if evaluation else {}
    )
    if scoring is not None:
        remembering["scores"] = scoring.scorer
    described = RunMetadata(
        run,
        family.name,
        prepared.model_files.name,
        prepared.train.placed_samples,
        [prompt for one in backends.train for prompt in one.instance_prompts],
        plan.epoch_at,
        folder.path,
    )
    exporter = Exporter(family, net, run, folder, emit, described.file_metadata)
    publishing = build_publishing(run, described, stop_requested, emit, closing)
    keeper = Checkpointer(
        folder,
        run.checkpoint,
        net,
        config,
        prepared.identity(),
        remembering,
        exporter.export_to_checkpoint,
        evaluation.best_step if evaluation else lambda: None,
        emit,
    )
    if origin is not None:
        keeper.restore(origin)
        folder.write_config(config)
    model = f"{run.model.model_family} {prepared.model_files.name}"
    first = emit_run_start(origin, folder, model, device, plan, emit)
    batch, sizes = build_batch_loader(run, prepared, order, plan, closing)

    def asked() -> list[StepCallback]:
        offered = {
            "save": keeper.save,
            **({"validate": pictures.generate_images} if pictures else {}),
        }
        return [action for name, action in offered.items() if folder.consume_control_request(name)]

    return TrainerContext(
        family,
        net.transformer,
        device,
        net.optimizer,
        net.optimizer_step,
        net.ema,
        plan,
        run.training.seed,
        run.flow,
        run.adapter.lora_dropout > 0 and net.uses_lora,
        lambda step: lr_schedule.learning_rate(net.optimizer_options, step, plan.total_steps),
        batch,
        sizes,
        first,
        keeper.save,
        build_callbacks(
            run, plan, keeper, pictures, evaluation, scoring, exporter, publishing, emit
        ),
        asked,
        stop_requested,
        emit,
    )


def emit_run_start(
    origin: ResumePoint | None,
    folder: RunFolder,
    model: str,
    device: ComputeDevice,
    plan: TrainSchedule,
    emit: Emit,
) -> int:
    """Tell where the run begins; returns the steps that are behind."""
    first = 0 if origin is None else origin.step
    emit(RunStarted(__version__, str(folder.path), model, str(device), plan.total_steps, first))
    if origin is not None:
        emit(RunResumed(first, origin.folder.name))
        if first >= plan.total_steps:
            emit(
                NoticeIssued(
                    f"all {plan.total_steps} steps are done; a larger max_train_steps would go on"
                )
            )
    return first


def make_train_schedule(run: RunConfig, batches_per_epoch: int) -> TrainSchedule:
    """Steps or epochs, whichever is given; the config sees to it that one is."""
    training = run.training
    accumulation, patience = training.gradient_accumulation_steps, training.nonfinite_loss_patience
    epochs = (training.num_train_epochs or 1) * batches_per_epoch / accumulation
    steps = training.max_train_steps or math.ceil(epochs)
    return TrainSchedule(steps, accumulation, batches_per_epoch, patience)


def build_batch_loader(
    run: RunConfig,
    prepared: PreparedInputs,
    order: SampleOrder,
    plan: TrainSchedule,
    closing: ExitStack,
) -> tuple[BatchPrefetcher, Callable[[int], tuple[int, int]]]:
    """Micro-batches by number, loaded ahead, and their sizes as Parts wants them."""
    alone = Lock()  # the loop and the loading thread ask for different numbers at the same time

    @lru_cache(64)
    def micro(number: int) -> MicroBatch:
        with alone:
            return order.micro_batch(number)

    def sizes(number: int) -> tuple[int, int]:
        visits = micro(number).visits
        width, height = prepared.train.placed_samples[visits[0].sample_index].bucket_px
        return len(visits), width * height // prepared.constants.token_px**2

    batches = prepared.make_batches(prepared.train, run.cache.vae_cache_sample, run.training.seed)
    last = plan.total_steps * plan.accumulation_steps - 1
    prefetch = BatchPrefetcher(lambda number: batches.load(micro(number)), last)
    closing.callback(prefetch.close)
    return prefetch, sizes


def build_image_validation(
    run: RunConfig,
    prepared: PreparedInputs,
    inference: Inference,
    net: TrainState,
    prompts: tuple[validation_prompts.Prompt, ...],
    plan: TrainSchedule,
    folder: RunFolder,
    emit: Emit,
) -> ImageValidationCallback | None:
    """The stage that draws; None when there is nothing to draw."""
    if not prompts:
        return None
    options = run.validation
    sizes, notes = validation_prompts.parse_sizes(
        options.validation_resolution, run.data, prepared.constants.alignment_px
    )
    for note in notes:
        emit(NoticeIssued(note))
    seed = run.training.seed if options.validation_seed is None else options.validation_seed
    drawn = validation_prompts.make_image_specs(prompts, sizes, options.num_validation_images, seed)
    settings = GenerationSettings(
        options.validation_num_inference_steps,
        options.validation_guidance_real,
        public_name(prepared.model_files.name),  # pictures are published
        prepared.identity_hash() + training_config_hash(resolved_options(run)),
    )
    decoder = prepared.decoder_loader(run.model, inference.device)
    chosen = options.validation_strengths.split(",") if net.uses_lora else ["none"]
    strengths = tuple(float(strength) for strength in chosen if strength != "none")
    validator = ImageValidator(
        inference, drawn, settings, prepared.text_embedding, decoder, folder.path, emit, strengths
    )
    return ImageValidationCallback(validator, net, run.optimizer.ema_validation, plan.total_steps)


def build_scoring(
    run: RunConfig,
    prepared: PreparedInputs,
    inference: Inference,
    net: TrainState,
    metrics: tuple[image_scoring.Metric, ...],
    emit: Emit,
) -> ScoringCallback | None:
    """The stage that scores; None where no score is asked for."""
    if not metrics:
        return None
    options = run.validation
    scorer = image_scoring.Scorer(
        inference,
        metrics,
        options.validation_num_inference_steps,
        options.validation_guidance_real,
        prepared.text_embedding,
        prepared.decoder_loader(run.model, inference.device),
        emit,
    )
    return ScoringCallback(scorer, net)


def build_publishing(
    run: RunConfig,
    described: RunMetadata,
    stop_requested: Callable[[], bool],
    emit: Emit,
    closing: ExitStack,
) -> PublishCallback:
    """The stage that writes the card, and uploads where that is asked for."""
    options, folder = run.publishing, described.run_dir
    if not options.push_to_hub:
        return PublishCallback(described, None, stop_requested)
    publisher = HubPublisher(
        folder, repository_name(options, folder), options.model_card_private, emit
    )
    closing.callback(publisher.close)
    return PublishCallback(described, publisher, stop_requested)


def build_callbacks(
    run: RunConfig,
    plan: TrainSchedule,
    keeper: Checkpointer,
    pictures: ImageValidationCallback | None,
    evaluation: HeldOutLossCallback | None,
    scoring: ScoringCallback | None,
    exporter: Exporter,
    publishing: PublishCallback,
    emit: Emit,
) -> tuple[ScheduledCallback, ...]:
    """Between steps, in order: evaluate (it names the best), score, save, draw, and at the end export."""

    def steps(interval: int) -> Callable[[int], int]:
        return lambda step: step // interval

    rows = []
    saving = run.checkpoint.checkpoint_step_interval
    if evaluation is not None:
        measuring = run.validation.eval_steps_interval or saving
        if measuring % saving:
            what = (
                f"checkpoint_step_interval {saving} does not divide eval_steps_interval {measuring}"
            )
            emit(
                WarningIssued(
                    f"{what}: the step with the lowest held-out loss may have no checkpoint"
                )
            )
        rows.append(ScheduledCallback(steps(measuring), evaluation.evaluate, at_start=True))
    benchmark = not run.validation.disable_benchmark
    if scoring is not None:
        interval = run.validation.evaluation_step_interval or plan.total_steps
        rows.append(ScheduledCallback(steps(interval), scoring.score, at_start=benchmark))
    rows.append(ScheduledCallback(steps(saving), keeper.save))
    epochs = run.checkpoint.checkpoint_epoch_interval
    if epochs is not None:
        rows.append(ScheduledCallback(lambda step: plan.epoch_at(step) // epochs, keeper.save))
    if run.publishing.push_checkpoints_to_hub:
        rows.append(ScheduledCallback(steps(saving), publishing.publish_checkpoint))
    if pictures is not None:
        drawn = steps(run.validation.validation_step_interval)
        rows.append(ScheduledCallback(drawn, pictures.generate_images, at_start=benchmark))
    rows.append(ScheduledCallback(lambda step: 0, exporter.export_final))
    rows.append(ScheduledCallback(lambda step: 0, publishing.publish_final))
    if evaluation is not None:
        rows.append(ScheduledCallback(lambda step: 0, evaluation.report_best_step))
    return tuple(rows)
