"""Build the TrainerContext from a configuration: the one module that connects all parts of a run.

Only this module and its parts (evaluation_callbacks.py, batches.py, train_state.py, prepare.py) see
the whole RunConfig; everything else gets the section of options that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from simpletuner.adapters.delta_penalty import delta_penalty
from simpletuner.config.load import resolved_options
from simpletuner.config.schema import RunConfig, trigger_word
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.data.sample_order import SampleOrder
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.models import registry
from simpletuner.models.family import ModelFamily
from simpletuner.training import optimizers, resume
from simpletuner.training.base_targets import BaseNetwork
from simpletuner.training.batches import build_batch_loader
from simpletuner.training.callbacks import (
    build_callbacks,
    build_publish_callback,
    build_requested_callbacks,
)
from simpletuner.training.checkpointer import Checkpointer
from simpletuner.training.device import ComputeDevice, select_device
from simpletuner.training.evaluation_callbacks import (
    EvaluationCallbacks,
    build_evaluation_callbacks,
)
from simpletuner.training.exporter import Exporter
from simpletuner.training.loop import TrainerContext, TrainSchedule
from simpletuner.training.metric_inputs import read_metric_prompts
from simpletuner.training.model_metadata import RunMetadata
from simpletuner.training.prepare import PreparedInputs, prepare_inputs
from simpletuner.training.resume import ResumePoint, TrainingInputs
from simpletuner.training.run_folder import RunFolder
from simpletuner.training.run_start import start_run
from simpletuner.training.train_state import TrainState, build_train_state
from simpletuner.training.world import World
from simpletuner.validation import image_scoring
from simpletuner.validation import prompts as validation_prompts

SIGMAS_AHEAD = 64  # of which Chroma's modulation vectors take 135 MB of host memory


def build_trainer_context(
    run: RunConfig,
    backends: DatasetFile,
    base_dir: Path,
    folder: RunFolder,
    world: World,
    stop_requested: Callable[[], bool],
    emit: Emit,
    closing: ExitStack,
) -> TrainerContext:
    """Return everything that the loop needs; every process calls this with the same run.

    base_dir: of the configuration file, for relative paths. closing: receives what must be closed.
    """
    saved, micro_batches = open_run(run, folder, world, emit)
    device = select_device(run.model, world.gpu_index, not run.distributed.fsdp_enable)
    family = get_family_with_notices(run, emit)
    prompts, metrics, texts = read_evaluation_inputs(run, base_dir, family, device, emit)
    encoding = family, texts, folder, device, world, emit, closing, saved
    inputs = prepare_inputs(run, backends, *encoding)
    order, schedule = make_order_and_schedule(run, inputs, micro_batches, emit)
    state = build_train_state(run, inputs, device, world, micro_batches, emit, closing)
    measured = prompts, metrics, device, schedule, world, folder, emit
    evaluations = build_evaluation_callbacks(run, inputs, state, *measured)
    metadata = describe_run(run, backends, family, inputs, schedule, folder)
    exporter, checkpointer = build_exporter_and_checkpointer(
        run, inputs, state, metadata, evaluations, folder, world, emit
    )
    step = start_run(run, inputs, saved, checkpointer, state, folder, device, schedule, world, emit)
    load, shape = build_batch_loader(run, inputs, order, schedule, world, device, closing)
    publishing = build_publish_callback(run, metadata, world, stop_requested, emit, closing)
    outputs = exporter, checkpointer, publishing
    callbacks, ends_after = build_callbacks(run, schedule, evaluations, *outputs, emit)
    return TrainerContext(
        predict_velocity=state.sharding.velocity_predictor(family, state.transformer),
        prepare_sigmas=partial(family.prepare_sigmas, state.transformer),
        transformer=state.transformer,
        base_network=make_base_network(inputs, state, device, world),
        weight_penalty=delta_penalty(state.transformer, run.preservation.delta_weight_penalty),
        device=device,
        optimizer=state.optimizer,
        optimizer_step=state.optimizer_step,
        ema=state.ema,
        schedule=schedule,
        world=world,
        seed=run.training.seed,
        flow_options=run.flow,
        uses_dropout=run.adapter.lora_dropout > 0 and state.uses_lora,
        learning_rate=learning_rate_of(state, schedule),
        load_batch=load,
        micro_batch_shape=shape,
        resumed_step=step,
        save_checkpoint=checkpointer.save,
        callbacks=callbacks,
        requested_callbacks=build_requested_callbacks(folder, world, checkpointer, evaluations),
        stop_requested=lambda: world.agree([stop_requested()])[0],
        ends_after=ends_after,
        emit=emit,
        adapter_copies=state.adapter_copies.current,
    )


def make_order_and_schedule(
    run: RunConfig, prepared: PreparedInputs, micro_batches: int, emit: Emit
) -> tuple[SampleOrder, TrainSchedule]:
    """Return the order of the training samples, and the length of the run.

    micro_batches: of one optimizer step, over all processes.
    """
    order = make_sample_order(run, prepared, micro_batches, emit)
    return order, make_train_schedule(run, micro_batches, order)


def make_sample_order(
    run: RunConfig, prepared: PreparedInputs, micro_batches: int, emit: Emit
) -> SampleOrder:
    """Return the order of the training samples, and note batches that are not full."""
    order = SampleOrder(
        prepared.train.placed_samples,
        prepared.train_sets,
        run.training.seed,
        run.training.train_batch_size,
        run.data,
        micro_batches,
    )
    for notice in order.notices:
        emit(NoticeIssued(notice))
    return order


def make_base_network(
    prepared: PreparedInputs, state: TrainState, device: ComputeDevice, world: World
) -> BaseNetwork:
    """Return the network without its adapter, as a source of targets."""
    return BaseNetwork(
        state.transformer,
        state.sharding.velocity_predictor(prepared.family, state.transformer),
        device.autocast,
        every_pass=world.equal_passes and prepared.rules.uses_base(),
    )


def open_run(
    run: RunConfig, folder: RunFolder, world: World, emit: Emit
) -> tuple[ResumePoint | None, int]:
    """Return the checkpoint to resume from, if there is one, and the micro-batches of a step.

    The options of the checkpoint are compared before anything is loaded. A new run writes
    config.json at once; a resumed one only after its state is restored.
    """
    config = resolved_options(run)
    resume_point = resume.find_common_resume_point(
        folder.path, run.checkpoint.resume_from_checkpoint, world, emit
    )
    accumulation = run.training.gradient_accumulation_steps
    if resume_point is None:
        folder.write_config(config)
        folder.discard_edited_prompts()
        return None, accumulation * world.size
    # As if the user had named the checkpoint: differences then give a warning.
    if run.checkpoint.resume_with_changes:
        resume_point = replace(resume_point, chosen_explicitly=True)
    resume_point.require_same_config(config, emit)
    return resume_point, resume_point.micro_batches_per_step(accumulation, world.size, emit)


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
    return validation_prompts.read_prompts(run.validation, base_dir, trigger_word(run))


def read_evaluation_inputs(
    run: RunConfig, base_dir: Path, family: ModelFamily, device: ComputeDevice, emit: Emit
) -> tuple[
    tuple[validation_prompts.Prompt, ...], tuple[image_scoring.Metric, ...], tuple[str, ...]
]:
    """Return the validation prompts, the metrics, and the texts to encode for both."""
    prompts = read_prompts(run, base_dir)
    metric_prompts = read_metric_prompts(run, base_dir, family.alignment_px, emit)
    metrics = image_scoring.choose_metrics(run.validation, device.device, metric_prompts)
    guidance = run.validation.validation_guidance_real
    negative = run.validation.validation_negative_prompt if guidance > 1 else ""
    texts = (
        negative,  # of images that start from a dataset's; an empty caption is always encoded
        *validation_prompts.prompt_texts(prompts, guidance),
        *image_scoring.metric_texts(metrics, guidance),
    )
    return prompts, metrics, texts


def make_train_schedule(run: RunConfig, micro_batches: int, order: SampleOrder) -> TrainSchedule:
    """Return the length of the run, from max_train_steps or else num_train_epochs.

    micro_batches: of one optimizer step, over all processes. Raises DataError where no dataset is
    active so late.
    """
    training, timeline = run.training, order.timeline
    steps = training.max_train_steps
    if steps is None:
        end = timeline.first_number(training.num_train_epochs or 1)
        steps = None if end is None else math.ceil(end / micro_batches)
    if timeline.end_number is not None and (
        steps is None or steps * micro_batches > timeline.end_number
    ):
        wanted = f"{steps} steps" if steps else f"{training.num_train_epochs} epochs"
        raise DataError(
            f"no dataset is active after step {timeline.end_number // micro_batches} (epoch "
            f"{timeline.end_epoch}), but the run has {wanted}: leave out end_step or end_epoch of "
            "a dataset, or shorten the run"
        )
    assert steps is not None
    return TrainSchedule(
        steps,
        micro_batches,
        order.batches_per_epoch,
        training.nonfinite_loss_patience,
        timeline if len(timeline.segments) > 1 else None,
        max(1, SIGMAS_AHEAD // (training.train_batch_size * micro_batches)),
    )


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
    images = [sample for sample in prepared.train.placed_samples if sample.crop_index == 0]
    return RunMetadata(
        run,
        family.name,
        prepared.model_files.name,
        images,
        instance_prompts,
        schedule.epoch_at,
        schedule.accumulation_steps,
        folder.path,
        prepared.rules,
    )


def build_exporter_and_checkpointer(
    run: RunConfig,
    prepared: PreparedInputs,
    state: TrainState,
    metadata: RunMetadata,
    evaluations: EvaluationCallbacks,
    folder: RunFolder,
    world: World,
    emit: Emit,
) -> tuple[Exporter, Checkpointer]:
    """Connect the exporter and the checkpointer with everything whose state is saved."""
    exporter = Exporter(prepared.family, state, run, folder, world, emit, metadata.file_metadata)
    checkpointer = Checkpointer(
        folder,
        world,
        run.checkpoint,
        state,
        resolved_options(run),
        metadata.micro_batches_per_step,
        TrainingInputs(
            prepared.identity(),
            prepared.older_identity(),
            prepared.sample_hashes(),
            prepared.encoded_now(),
            {
                "text_encoder_batch_size": run.cache.text_encoder_batch_size,
                "vae_batch_size": run.cache.vae_batch_size,
            },
            sorted(prepared.held_out),
        ),
        evaluations.stateful_evaluators(),
        exporter.export_to_checkpoint,
        evaluations.best_step,
        emit,
    )
    return exporter, checkpointer
