"""The callbacks of a run: evaluations, checkpoints, uploads, and requests of a user."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from simpletuner.config.schema import RunConfig
from simpletuner.events.event_types import Emit, WarningIssued
from simpletuner.training.checkpointer import Checkpointer
from simpletuner.training.early_stopping import EarlyStopping
from simpletuner.training.evaluation_callbacks import EvaluationCallbacks
from simpletuner.training.exporter import Exporter
from simpletuner.training.loop import ScheduledCallback, StepCallback, TrainSchedule
from simpletuner.training.model_metadata import RunMetadata
from simpletuner.training.publish_callback import PublishCallback
from simpletuner.training.run_folder import RunFolder
from simpletuner.training.world import World


def build_callbacks(
    run: RunConfig,
    schedule: TrainSchedule,
    evaluations: EvaluationCallbacks,
    exporter: Exporter,
    checkpointer: Checkpointer,
    publishing: PublishCallback | None,
    emit: Emit,
) -> tuple[tuple[ScheduledCallback, ...], Callable[[int], bool]]:
    """Return the callbacks in their order within a step, and whether the run ends after a step.

    The held-out loss comes first, because it decides which checkpoint is the best and must not be
    deleted by the save that follows, and whether the run ends. Then come the scores, the checkpoint
    and its upload, and the validation images. After the last step the weights are exported, with
    early stopping those of the best step, and then published.
    """
    early_stopping = build_early_stopping(run, schedule, checkpointer, evaluations, emit)
    callbacks = build_measurements(run, schedule, evaluations, early_stopping, emit)
    with_baseline = not run.validation.disable_benchmark
    save_interval = run.checkpoint.checkpoint_step_interval
    callbacks.append(ScheduledCallback(every(save_interval), evaluations.weight_change.measure))
    callbacks.append(ScheduledCallback(every(save_interval), checkpointer.save))
    epochs = run.checkpoint.checkpoint_epoch_interval
    if epochs is not None:
        callbacks.append(
            ScheduledCallback(lambda step: schedule.epoch_at(step) // epochs, checkpointer.save)
        )
    if run.publishing.push_checkpoints_to_hub and publishing is not None:
        callbacks.append(ScheduledCallback(every(save_interval), publishing.publish_checkpoint))
    if evaluations.images is not None:
        interval = run.validation.validation_step_interval
        generate = evaluations.images.generate_images
        callbacks.append(ScheduledCallback(every(interval), generate, at_start=with_baseline))
    # Early stopping puts the best weights back first, so the export must come after it.
    export: StepCallback = exporter.export_final
    if early_stopping is not None:
        callbacks.append(ScheduledCallback(at_the_end, early_stopping.use_best_weights))
        export = early_stopping.exporting(export)
    callbacks.append(ScheduledCallback(at_the_end, export))
    if publishing is not None:
        callbacks.append(ScheduledCallback(at_the_end, publishing.publish_final))
    if evaluations.held_out is not None:
        callbacks.append(ScheduledCallback(at_the_end, evaluations.held_out.report_best_step))
    return tuple(callbacks), early_stopping.ends_after if early_stopping else never


def never(step: int) -> bool:
    """Return that the run does not end before its last step."""
    return False


def build_measurements(
    run: RunConfig,
    schedule: TrainSchedule,
    evaluations: EvaluationCallbacks,
    early_stopping: EarlyStopping | None,
    emit: Emit,
) -> list[ScheduledCallback]:
    """Return the callbacks of the held-out loss and of the scores, by steps or by epochs."""

    def every_epochs(epochs: float) -> Callable[[int], int]:
        return lambda step: int(schedule.epochs_at(step) / epochs)

    options = run.validation
    epochs = options.eval_epoch_interval
    callbacks = []
    if evaluations.held_out is not None:
        indices = []
        if epochs is not None:
            indices.append(every_epochs(epochs))
        if options.eval_steps_interval is not None or epochs is None:
            save_interval = run.checkpoint.checkpoint_step_interval
            interval = options.eval_steps_interval or save_interval
            if early_stopping is None:
                warn_if_best_step_is_not_saved(interval, save_interval, emit)
            else:
                warn_if_it_cannot_stop(interval, schedule, early_stopping.patience, emit)
            indices.append(every(interval))
        at_start = run.tuning.eval_at_start
        for index in indices:
            evaluate = evaluations.held_out.evaluate
            callbacks.append(ScheduledCallback(index, evaluate, at_start))
            if early_stopping is not None:
                callbacks.append(ScheduledCallback(index, early_stopping.check))
    if evaluations.scoring is not None:
        index = every(options.evaluation_step_interval or schedule.total_steps)
        if epochs is not None and options.evaluation_step_interval is None:
            index = every_epochs(epochs)
        with_baseline = not options.disable_benchmark
        callbacks.append(
            ScheduledCallback(index, evaluations.scoring.score, at_start=with_baseline)
        )
    return callbacks


def build_early_stopping(
    run: RunConfig,
    schedule: TrainSchedule,
    checkpointer: Checkpointer,
    evaluations: EvaluationCallbacks,
    emit: Emit,
) -> EarlyStopping | None:
    """Return what ends the run early; None without early_stopping."""
    if not run.tuning.early_stopping or evaluations.held_out is None:
        return None
    return EarlyStopping(
        evaluations.held_out.evaluator,
        run.tuning.early_stopping_patience,
        schedule.total_steps,
        checkpointer.save,
        checkpointer.load_weights,
        run.optimizer,
        emit,
    )


def warn_if_it_cannot_stop(
    interval: int, schedule: TrainSchedule, patience: int, emit: Emit
) -> None:
    """Warn where the run has too few measurements for early stopping."""
    if schedule.total_steps // interval <= patience:
        advised = max(1, schedule.total_steps // (4 * (patience + 1)))
        emit(
            WarningIssued(
                f"early_stopping cannot end this run early: the held-out loss is measured every "
                f"{interval} steps, and it waits for {patience} measurements without an "
                f"improvement; set eval_steps_interval {advised}"
            )
        )


def every(interval: int) -> Callable[[int], int]:
    """Return the index of a callback that runs every so many steps; 0: after the last one only."""
    return lambda step: step // interval if interval else 0


def at_the_end(step: int) -> int:
    """Return the index of a callback that runs after the last step only."""
    return 0


def build_requested_callbacks(
    folder: RunFolder,
    world: World,
    checkpointer: Checkpointer,
    evaluations: EvaluationCallbacks,
) -> Callable[[], list[StepCallback]]:
    """Return a function that lists what a user asked for, by files in control/, since last time.

    The main process reads them, and every process runs the same callbacks.
    """
    offered: dict[str, StepCallback] = {"save": checkpointer.save}
    if evaluations.images is not None:
        offered["validate"] = evaluations.images.generate_images

    def requested() -> list[StepCallback]:
        wanted = world.agree([folder.consume_control_request(name) for name in offered])
        return [
            callback
            for callback, is_wanted in zip(offered.values(), wanted, strict=True)
            if is_wanted
        ]

    return requested


def build_publish_callback(
    run: RunConfig,
    metadata: RunMetadata,
    world: World,
    stop_requested: Callable[[], bool],
    emit: Emit,
    closing: ExitStack,
) -> PublishCallback | None:
    """Return the callback that writes the model card and, with push_to_hub, uploads the results.

    None except in the main process.
    """
    options = run.publishing
    if not world.is_main:
        return None
    if not options.push_to_hub:
        return PublishCallback(metadata, None, stop_requested)
    from simpletuner.training.hub_publisher import HubPublisher, repository_name

    repository = repository_name(options, metadata.run_dir)
    publisher = HubPublisher(metadata.run_dir, repository, options.model_card_private, emit)
    closing.callback(publisher.close)
    return PublishCallback(metadata, publisher, stop_requested)


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
