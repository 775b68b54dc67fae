"""Callbacks that evaluate the current weights: validation images, held-out loss and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from simpletuner.cache.latent_cache import LatentCacheResult
from simpletuner.config.compare_configs import training_config_hash
from simpletuner.config.load import resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.config.tuning_constraints import NO_HELD_OUT_IMAGES
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.training.device import ComputeDevice
from simpletuner.training.loop import TrainSchedule
from simpletuner.training.metric_inputs import reference_loader
from simpletuner.training.model_metadata import public_name
from simpletuner.training.prepare import PreparedInputs, select_samples
from simpletuner.training.prompt_edits import PromptEdits
from simpletuner.training.run_folder import RunFolder
from simpletuner.training.train_state import TrainState
from simpletuner.training.validation_starts import plan_validation_images, validation_seed
from simpletuner.training.weight_change import WeightChange
from simpletuner.training.world import World
from simpletuner.validation.convergence import DEFAULT_PATIENCE
from simpletuner.validation.held_out_loss import (
    HeldOutEvaluator,
    HeldOutSet,
    choose_samples,
    fixed_batches,
)
from simpletuner.validation.image_scoring import Metric, MetricEvaluator
from simpletuner.validation.image_validator import BASE_STEP, ImageValidator, strength_label
from simpletuner.validation.inference import Inference
from simpletuner.validation.prompts import Prompt, parse_sizes
from simpletuner.validation.sampling_preview import (
    PREVIEW_FILE,
    RgbProjection,
    SamplingPreview,
    fit_projection,
)
from simpletuner.validation.validation_images import GenerationSettings


@contextmanager
def at_lora_strength(state: TrainState, strength: float) -> Iterator[None]:
    """Apply the LoRA at that strength inside the context, and at 1 afterwards."""
    state.set_lora_strength(strength)
    try:
        yield
    finally:
        state.set_lora_strength(1.0)


@contextmanager
def evaluation_weights(state: TrainState, step: int) -> Iterator[str]:
    """Put the weights to evaluate into the network, and yield their name.

    "base" is the untouched base at step 0, "ema" the average where there is one, else "trained".
    """
    if step == BASE_STEP:
        with at_lora_strength(state, 0.0):
            yield "base"
    elif state.averaged_weights is not None:
        with state.averaged_weights():
            yield "ema"
    else:
        yield "trained"


@dataclass
class ImageValidationCallback:
    """Generates the validation images of a step.

    At step 0 the untouched base is used; later the trained weights, their average, or both.
    last_step: the step at which the LoRA is also tried at the validator's other strengths. update:
    takes up the prompts that a user has edited; it is called with the step.
    """

    validator: ImageValidator
    train_state: TrainState
    ema_validation: str
    last_step: int
    update: Callable[[int], None] = lambda step: None

    def generate_images(self, step: int) -> None:
        self.update(step)
        average, transformer = self.train_state.averaged_weights, self.train_state.transformer
        if step != BASE_STEP and average is not None and self.ema_validation != "ema_only":
            self.validator.generate_images(step, transformer, "trained")
        if step == BASE_STEP or average is None or self.ema_validation != "none":
            with evaluation_weights(self.train_state, step) as weights:
                self.validator.generate_images(step, transformer, weights)
        if step == self.last_step:
            self._generate_at_other_strengths(step)

    def _generate_at_other_strengths(self, step: int) -> None:
        average = self.train_state.averaged_weights
        only_average = average is not None and self.ema_validation == "ema_only"
        with average() if average is not None and only_average else nullcontext():
            for strength in self.validator.extra_strengths:
                with at_lora_strength(self.train_state, strength):
                    self.validator.generate_images(
                        step, self.train_state.transformer, strength_label(strength)
                    )


@dataclass
class ScoringCallback:
    """Scores the untouched base at step 0, later the average where there is one."""

    scorer: MetricEvaluator
    train_state: TrainState

    def score(self, step: int) -> None:
        with evaluation_weights(self.train_state, step) as weights:
            self.scorer.score(step, self.train_state.transformer, weights)


@dataclass
class HeldOutLossCallback:
    """Measures the held-out loss, of the averaged weights where there are any.

    The average is what is exported for use, so its loss decides which step is the best. patience:
    measurements without an improvement after which the loss counts as flat.
    """

    evaluator: HeldOutEvaluator
    train_state: TrainState
    run_dir: Path
    emit: Emit
    patience: int = DEFAULT_PATIENCE
    _last_verdict: str = field(default="unknown", init=False)

    def evaluate(self, step: int) -> None:
        # A resumed run repeats the callbacks of its step, and two intervals may meet in one.
        if step == self.evaluator.last_step:
            return
        average = None if step == BASE_STEP else self.train_state.averaged_weights
        # The change since the start is reported. A LoRA given as init_lora belongs to the start, so
        # it is not switched off at step 0.
        with nullcontext() if average is None else average():
            self.evaluator.evaluate(self.train_state.transformer, step, self.emit)
        if self.evaluator.trajectory.steps:
            verdict = self.evaluator.trajectory.judge(self.patience)
            if verdict.verdict not in (self._last_verdict, "unknown"):
                self.emit(verdict)
            self._last_verdict = verdict.verdict

    def best_step(self) -> int | None:
        return self.evaluator.best_step

    def report_best_step(self, step: int) -> None:
        """Emit the losses of each sample, the best step with its checkpoint, and the verdict."""
        self.evaluator.emit_sample_losses(step, self.emit)
        best, loss = self.evaluator.best_step, self.evaluator.best_loss
        if best is None:
            return
        checkpoint = self.run_dir / f"checkpoint-{best}"
        if checkpoint.is_dir():
            remark = f": {checkpoint}"
        else:
            remark = "; training did not lower it" if best == BASE_STEP else ""
        self.emit(NoticeIssued(f"lowest held-out loss {loss:.4f} at step {best}{remark}"))
        if self.evaluator.trajectory.steps:
            self.emit(self.evaluator.trajectory.judge(self.patience))


@dataclass(frozen=True)
class EvaluationCallbacks:
    """The evaluations of a run; None for those that the options do not ask for."""

    held_out: HeldOutLossCallback | None
    images: ImageValidationCallback | None
    scoring: ScoringCallback | None
    weight_change: WeightChange

    def stateful_evaluators(self) -> dict[str, HeldOutEvaluator | MetricEvaluator]:
        """Return the evaluators whose state is part of a checkpoint, by their key in state.json."""
        evaluators: dict[str, HeldOutEvaluator | MetricEvaluator] = {}
        if self.held_out is not None:
            evaluators["heldout"] = self.held_out.evaluator
        if self.scoring is not None:
            evaluators["scores"] = self.scoring.scorer
        return evaluators

    def best_step(self) -> int | None:
        """Return the step with the lowest held-out loss; None where it is not measured."""
        return None if self.held_out is None else self.held_out.best_step()


def build_evaluation_callbacks(
    run: RunConfig,
    prepared: PreparedInputs,
    state: TrainState,
    prompts: tuple[Prompt, ...],
    metrics: tuple[Metric, ...],
    device: ComputeDevice,
    schedule: TrainSchedule,
    world: World,
    folder: RunFolder,
    emit: Emit,
) -> EvaluationCallbacks:
    """Build the evaluations that the options, prompts and datasets ask for."""
    inference = Inference(
        prepared.family, prepared.constants, device.device, device.weights_dtype, device.autocast
    )
    evaluator = build_held_out_evaluator(run, prepared, inference, world)
    held_out, run_dir = None, folder.path
    if evaluator is not None:
        patience = run.tuning.early_stopping_patience
        held_out = HeldOutLossCallback(evaluator, state, run_dir, emit, patience)
    images = None
    uses_datasets = (
        run.validation.validation_using_datasets and not run.validation.validation_disable
    )
    if prompts or uses_datasets:
        validator = build_image_validator(
            run, prepared, state, inference, prompts, schedule, world, run_dir, emit
        )
        edits = PromptEdits(run, prepared, device, folder, validator, prompts, world, emit)
        images = ImageValidationCallback(
            validator, state, run.optimizer.ema_validation, schedule.total_steps, edits.update
        )
        edits.emit_prompts(BASE_STEP, edited=False)
    scoring = None
    if metrics:
        scorer = MetricEvaluator(
            inference,
            metrics,
            run.validation.validation_num_inference_steps,
            run.validation.validation_guidance_real,
            prepared.text_embedding,
            prepared.decoder_loader(run.model, inference.device),
            emit,
            world,
            reference_loader(run, prepared.taught().placed_samples),
        )
        scoring = ScoringCallback(scorer, state)
    change = WeightChange(state, world, emit, schedule.total_steps)
    return EvaluationCallbacks(held_out, images, scoring, change)


def build_image_validator(
    run: RunConfig,
    prepared: PreparedInputs,
    state: TrainState,
    inference: Inference,
    prompts: tuple[Prompt, ...],
    schedule: TrainSchedule,
    world: World,
    run_dir: Path,
    emit: Emit,
) -> ImageValidator:
    """Build the generator of the validation images; odd sizes are rounded with a notice."""
    options = run.validation
    sizes, notices = parse_sizes(
        options.validation_resolution, run.data, prepared.constants.alignment_px
    )
    for notice in notices:
        emit(NoticeIssued(notice))
    seed = validation_seed(run)
    settings = GenerationSettings(
        options.validation_num_inference_steps,
        options.validation_guidance_real,
        public_name(prepared.model_files.name),  # images are published, so no path of this machine
        prepared.identity_hash()
        + training_config_hash(resolved_options(run), schedule.accumulation_steps),
    )
    strengths = options.validation_strengths.split(",") if state.uses_lora else ["none"]
    image_specs, start_of = plan_validation_images(
        run, prepared, prompts, sizes, seed, inference.device
    )
    return ImageValidator(
        inference,
        image_specs,
        settings,
        prepared.text_embedding,
        prepared.decoder_loader(run.model, inference.device),
        run_dir,
        emit,
        tuple(float(strength) for strength in strengths if strength != "none"),
        world,
        start_of,
        build_sampling_preview(run, prepared, inference, run_dir) if world.is_main else None,
    )


def build_sampling_preview(
    run: RunConfig, prepared: PreparedInputs, inference: Inference, run_dir: Path
) -> SamplingPreview | None:
    """Build the preview of images that are being sampled; None without validation_preview."""
    options = run.validation
    if not options.validation_preview:
        return None

    def load_projection() -> RgbProjection:
        vae = prepared.family.load_vae(prepared.model_files, run.model, inference.device)
        return fit_projection(vae, prepared.constants)

    path = run_dir / "images" / PREVIEW_FILE
    return SamplingPreview(path, options.validation_preview_steps, load_projection)


def build_held_out_evaluator(
    run: RunConfig, prepared: PreparedInputs, inference: Inference, world: World
) -> HeldOutEvaluator | None:
    """Measure the held-out images and a fixed part of the training set, equally large by default.

    None without either, and with eval_loss_disable. Raises DataError where early_stopping has no
    held-out images to decide by.
    """
    if run.validation.eval_loss_disable:
        return None
    dataset_id = run.validation.eval_dataset_id
    chosen = select_samples(
        prepared.eval, lambda placed: dataset_id in (None, placed.sample.dataset)
    )
    count = min(run.validation.num_eval_images, len(chosen.placed_samples))
    if run.tuning.early_stopping and not count:
        raise DataError(NO_HELD_OUT_IMAGES)
    wanted = run.tuning.num_train_loss_images
    taught = prepared.taught()
    train_count = min(count if wanted is None else wanted, len(taught.placed_samples))
    sets = []
    if count:
        sets.append(make_held_out_set(run, prepared, chosen, "eval", count))
    if train_count:
        sets.append(make_held_out_set(run, prepared, taught, "train", train_count))
    if not sets:
        return None
    return HeldOutEvaluator(
        inference, sets, run.validation.eval_sigma_count, run.training.seed, world
    )


def make_held_out_set(
    run: RunConfig, prepared: PreparedInputs, cached: LatentCacheResult, split: str, count: int
) -> HeldOutSet:
    """Choose `count` fixed samples of a split; their batches are loaded at every measurement."""
    seed, placed = run.training.seed, cached.placed_samples
    micro_batches = fixed_batches(
        placed, choose_samples(placed, count, seed), max(run.training.train_batch_size, 4)
    )
    loader = prepared.make_batches(cached, "mean", seed)
    name = ", ".join(sorted({item.sample.dataset for item in placed}))
    return HeldOutSet(split, name, count, [partial(loader.load, plan) for plan in micro_batches])
