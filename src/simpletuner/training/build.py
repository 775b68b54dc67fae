"""Build the TrainerContext from a configuration: the one module that connects all parts of a run.

Only this module and its parts (evaluation_callbacks.py, batches.py, train_state.py, prepare.py) see
the whole RunConfig; everything else gets the section of options that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from simpletuner import __version__
from simpletuner.config.load import resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.data.sample_order import SampleOrder
from simpletuner.events.event_types import Emit, NoticeIssued, RunResumed, RunStarted, WarningIssued
from simpletuner.models import registry
from simpletuner.models.family import ModelFamily
from simpletuner.training import optimizers, resume
from simpletuner.training.batches import build_batch_loader
from simpletuner.training.checkpointer import Checkpointer
from simpletuner.training.device import ComputeDevice, select_device
from simpletuner.training.evaluation_callbacks import (
    EvaluationCallbacks,
    build_evaluation_callbacks,
)
from simpletuner.training.exporter import Exporter
from simpletuner.training.hub_publisher import HubPublisher, PublishCallback, repository_name
from simpletuner.training.loop import ScheduledCallback, StepCallback, TrainerContext, TrainSchedule
from simpletuner.training.model_metadata import RunMetadata
from simpletuner.training.prepare import PreparedInputs, prepare_inputs
from simpletuner.training.resume import ResumePoint
from simpletuner.training.run_folder import RunFolder
from simpletuner.training.train_state import TrainState, build_train_state
from simpletuner.validation import image_scoring
from simpletuner.validation import prompts as validation_prompts


def build_trainer_context(
    run: RunConfig,
    backends: DatasetFile,
    base_dir: Path,
    folder: RunFolder,
    stop_requested: Callable[[], bool],
    emit: Emit,
    closing: ExitStack,
) -> TrainerContext:
    """Return everything that the loop needs.

    base_dir: the folder of the configuration file, where relative paths are looked up first.
    closing: receives whatever must be closed after the training. The run folder of a training with
    other options is refused before anything is encoded or loaded, and is not changed.
    """
    resume_point = open_run(run, folder, emit)
    device, family = select_device(run.model), get_family_with_notices(run, emit)
    prompts = read_prompts(run, base_dir)
    metrics = image_scoring.choose_metrics(run.validation, device.device)
    texts = evaluation_texts(run, prompts, metrics)
    prepared = prepare_inputs(run, backends, family, texts, folder, device, emit, closing)
    order = make_sample_order(run, prepared, emit)
    schedule = make_train_schedule(run, order.batches_per_epoch)
    state = build_train_state(run, prepared, device, emit)

    evaluations = build_evaluation_callbacks(
        run, prepared, state, prompts, metrics, device, schedule.total_steps, folder.path, emit
    )
    metadata = describe_run(run, backends, family, prepared, schedule, folder)
    exporter = Exporter(family, state, run, folder, emit, metadata.file_metadata)
    publishing = build_publish_callback(run, metadata, stop_requested, emit, closing)
    checkpointer = build_checkpointer(run, prepared, state, evaluations, exporter, folder, emit)
    resumed_step = start_run(
        run, prepared, resume_point, checkpointer, folder, device, schedule, emit
    )
    load_batch, micro_batch_shape = build_batch_loader(run, prepared, order, schedule, closing)
    return TrainerContext(
        predict_velocity=partial(family.predict_velocity, state.transformer),
        transformer=state.transformer,
        device=device,
        optimizer=state.optimizer,
        optimizer_step=state.optimizer_step,
        ema=state.ema,
        schedule=schedule,
        seed=run.training.seed,
        flow_options=run.flow,
        uses_dropout=run.adapter.lora_dropout > 0 and state.uses_lora,
        learning_rate=learning_rate_of(state, schedule),
        load_batch=load_batch,
        micro_batch_shape=micro_batch_shape,
        resumed_step=resumed_step,
        save_checkpoint=checkpointer.save,
        callbacks=build_callbacks(
            run, schedule, checkpointer, evaluations, exporter, publishing, emit
        ),
        requested_callbacks=build_requested_callbacks(folder, checkpointer, evaluations),
        stop_requested=stop_requested,
        emit=emit,
    )


def make_sample_order(run: RunConfig, prepared: PreparedInputs, emit: Emit) -> SampleOrder:
    """Return the order of the training samples, and warn of batches that are not full."""
    order = SampleOrder(
        prepared.train.placed_samples,
        prepared.train_sets,
        run.training.seed,
        run.training.train_batch_size,
        run.data,
    )
    for warning in order.notices:
        emit(WarningIssued(warning))
    return order


def open_run(run: RunConfig, folder: RunFolder, emit: Emit) -> ResumePoint | None:
    """Return the checkpoint to resume from, if there is one, after its options were compared.

    A new run writes config.json at once; a resumed one only after its state is restored.
    """
    config = resolved_options(run)
    resume_point = resume.find_resume_point(
        folder.path, run.checkpoint.resume_from_checkpoint, emit
    )
    if resume_point is None:
        folder.write_config(config)
    else:
        resume_point.require_same_config(config, emit)
    return resume_point


def get_family_with_notices(run: RunConfig, emit: Emit) -> ModelFamily:
    """Return the model family, after emitting what it has to say about the chosen model."""
    family = registry.get_family(run.model.model_family)
    for notice in family.notices(run.model):
        emit(NoticeIssued(notice))
    return family


def read_prompts(run: RunConfig, base_dir: Path) -> tuple[validation_prompts.Prompt, ...]:
    """Return the validation prompts; none with validation_disable."""
    if run.validation.validation_disable:
        return ()
    return validation_prompts.read_prompts(run.validation, base_dir)


def evaluation_texts(
    run: RunConfig,
    prompts: tuple[validation_prompts.Prompt, ...],
    metrics: tuple[image_scoring.Metric, ...],
) -> tuple[str, ...]:
    """Return the texts that validation images and metrics need, to be encoded with the captions."""
    guidance = run.validation.validation_guidance_real
    return (
        *validation_prompts.prompt_texts(prompts, guidance),
        *image_scoring.metric_texts(metrics, guidance),
    )


def make_train_schedule(run: RunConfig, batches_per_epoch: int) -> TrainSchedule:
    """Return the length of the run, from max_train_steps or else num_train_epochs."""
    training = run.training
    accumulation = training.gradient_accumulation_steps
    epochs = (training.num_train_epochs or 1) * batches_per_epoch / accumulation
    steps = training.max_train_steps or math.ceil(epochs)
    return TrainSchedule(steps, accumulation, batches_per_epoch, training.nonfinite_loss_patience)


def learning_rate_of(state: TrainState, schedule: TrainSchedule) -> Callable[[int], float]:
    """Return the learning rate as a function of the step."""
    return lambda step: optimizers.learning_rate(
        state.optimizer_options, step, schedule.total_steps
    )


def describe_run(
    run: RunConfig,
    backends: DatasetFile,
    family: ModelFamily,
    prepared: PreparedInputs,
    schedule: TrainSchedule,
    folder: RunFolder,
) -> RunMetadata:
    """Collect what the headers of exported files and the model card say about the run."""
    instance_prompts = [prompt for dataset in backends.train for prompt in dataset.instance_prompts]
    return RunMetadata(
        run,
        family.name,
        prepared.model_files.name,
        prepared.train.placed_samples,
        instance_prompts,
        schedule.epoch_at,
        folder.path,
    )


def build_checkpointer(
    run: RunConfig,
    prepared: PreparedInputs,
    state: TrainState,
    evaluations: EvaluationCallbacks,
    exporter: Exporter,
    folder: RunFolder,
    emit: Emit,
) -> Checkpointer:
    """Connect the checkpointer with everything whose state is saved."""
    return Checkpointer(
        folder,
        run.checkpoint,
        state,
        resolved_options(run),
        prepared.identity(),
        evaluations.stateful_evaluators(),
        exporter.export_to_checkpoint,
        evaluations.best_step,
        emit,
    )


def build_publish_callback(
    run: RunConfig,
    metadata: RunMetadata,
    stop_requested: Callable[[], bool],
    emit: Emit,
    closing: ExitStack,
) -> PublishCallback:
    """Return the callback that writes the model card and, with push_to_hub, uploads the results."""
    options = run.publishing
    if not options.push_to_hub:
        return PublishCallback(metadata, None, stop_requested)
    repository = repository_name(options, metadata.run_dir)
    publisher = HubPublisher(metadata.run_dir, repository, options.model_card_private, emit)
    closing.callback(publisher.close)
    return PublishCallback(metadata, publisher, stop_requested)


def start_run(
    run: RunConfig,
    prepared: PreparedInputs,
    resume_point: ResumePoint | None,
    checkpointer: Checkpointer,
    folder: RunFolder,
    device: ComputeDevice,
    schedule: TrainSchedule,
    emit: Emit,
) -> int:
    """Restore the checkpoint, if there is one, and return the number of completed steps."""
    if resume_point is not None:
        checkpointer.restore(resume_point)
        folder.write_config(resolved_options(run))
    model = f"{run.model.model_family} {prepared.model_files.name}"
    return emit_run_start(resume_point, folder, model, device, schedule, emit)


def emit_run_start(
    resume_point: ResumePoint | None,
    folder: RunFolder,
    model: str,
    device: ComputeDevice,
    schedule: TrainSchedule,
    emit: Emit,
) -> int:
    """Emit where the run begins, and return the number of steps that are already complete."""
    step = 0 if resume_point is None else resume_point.step
    total = schedule.total_steps
    emit(RunStarted(__version__, str(folder.path), model, str(device), total, step))
    if resume_point is not None:
        emit(RunResumed(step, resume_point.folder.name))
        if step >= total:
            steps = "the one step is" if total == 1 else f"all {total} steps are"
            emit(NoticeIssued(f"{steps} complete; to train further, raise max_train_steps"))
    return step


def build_requested_callbacks(
    folder: RunFolder, checkpointer: Checkpointer, evaluations: EvaluationCallbacks
) -> Callable[[], list[StepCallback]]:
    """Return a function that lists what a user asked for, by files in control/, since last time."""
    offered: dict[str, StepCallback] = {"save": checkpointer.save}
    if evaluations.images is not None:
        offered["validate"] = evaluations.images.generate_images
    return lambda: [
        callback for name, callback in offered.items() if folder.consume_control_request(name)
    ]


def build_callbacks(
    run: RunConfig,
    schedule: TrainSchedule,
    checkpointer: Checkpointer,
    evaluations: EvaluationCallbacks,
    exporter: Exporter,
    publishing: PublishCallback,
    emit: Emit,
) -> tuple[ScheduledCallback, ...]:
    """Return the callbacks in their order within a step.

    The held-out loss comes first, because it decides which checkpoint is the best and must not be
    deleted by the save that follows. Then come the scores, the checkpoint and its upload, and the
    validation images. After the last step the weights are exported, and then published.
    """

    def every(interval: int) -> Callable[[int], int]:
        return lambda step: step // interval

    def at_the_end(step: int) -> int:
        return 0

    callbacks = []
    save_interval = run.checkpoint.checkpoint_step_interval
    with_baseline = not run.validation.disable_benchmark
    if evaluations.held_out is not None:
        interval = run.validation.eval_steps_interval or save_interval
        warn_if_best_step_is_not_saved(interval, save_interval, emit)
        evaluate = evaluations.held_out.evaluate
        callbacks.append(ScheduledCallback(every(interval), evaluate, at_start=True))
    if evaluations.scoring is not None:
        interval = run.validation.evaluation_step_interval or schedule.total_steps
        score = evaluations.scoring.score
        callbacks.append(ScheduledCallback(every(interval), score, at_start=with_baseline))
    callbacks.append(ScheduledCallback(every(save_interval), checkpointer.save))
    epochs = run.checkpoint.checkpoint_epoch_interval
    if epochs is not None:
        callbacks.append(
            ScheduledCallback(lambda step: schedule.epoch_at(step) // epochs, checkpointer.save)
        )
    if run.publishing.push_checkpoints_to_hub:
        callbacks.append(ScheduledCallback(every(save_interval), publishing.publish_checkpoint))
    if evaluations.images is not None:
        interval = run.validation.validation_step_interval
        generate = evaluations.images.generate_images
        callbacks.append(ScheduledCallback(every(interval), generate, at_start=with_baseline))
    callbacks.append(ScheduledCallback(at_the_end, exporter.export_final))
    callbacks.append(ScheduledCallback(at_the_end, publishing.publish_final))
    if evaluations.held_out is not None:
        callbacks.append(ScheduledCallback(at_the_end, evaluations.held_out.report_best_step))
    return tuple(callbacks)


def warn_if_best_step_is_not_saved(eval_interval: int, save_interval: int, emit: Emit) -> None:
    """Warn when a step can be evaluated without being saved."""
    if eval_interval % save_interval:
        emit(
            WarningIssued(
                f"eval_steps_interval {eval_interval} is not a multiple of "
                f"checkpoint_step_interval {save_interval}: the step with the lowest held-out loss "
                "may have no checkpoint"
            )
        )
