"""What is done between steps with the weights of the moment: pictures, held-out loss, scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from simpletuner.cache.latent_cache import LatentCacheResult
from simpletuner.config.schema import RunConfig
from simpletuner.events.event_types import Emit, NoticeIssued
from simpletuner.training.prepare import PreparedInputs, select_samples
from simpletuner.training.train_state import TrainState
from simpletuner.validation.held_out_loss import (
    HeldOutEvaluator,
    HeldOutSet,
    choose_samples,
    fixed_batches,
)
from simpletuner.validation.image_scoring import Scorer
from simpletuner.validation.image_validator import BASE_STEP, ImageValidator, strength_label
from simpletuner.validation.inference import Inference


@contextmanager
def at_lora_strength(net: TrainState, strength: float) -> Iterator[None]:
    """The LoRA at that strength inside, at its own after."""
    net.set_lora_strength(strength)
    try:
        yield
    finally:
        net.set_lora_strength(1.0)


@contextmanager
def evaluation_weights(net: TrainState, step: int) -> Iterator[str]:
    """What the weights inside are called: the untouched base at step 0, then the average if there is one."""
    if step == BASE_STEP:
        with at_lora_strength(net, 0.0):
            yield "base"
    elif net.averaged_weights is not None:
        with net.averaged_weights():
            yield "ema"
    else:
        yield "trained"


@dataclass
class ImageValidationCallback:
    """Draws at a step: the untouched base at step 0, then the trained weights, their average, or both.

    last_step: where the LoRA is drawn at the validator's other strengths too.
    """

    validator: ImageValidator
    train_state: TrainState
    ema_validation: str
    last_step: int

    def generate_images(self, step: int) -> None:
        average, transformer = self.train_state.averaged_weights, self.train_state.transformer
        if step != BASE_STEP and average is not None and self.ema_validation != "ema_only":
            self.validator.generate_images(step, transformer, "trained")
        if step == BASE_STEP or average is None or self.ema_validation != "none":
            with evaluation_weights(self.train_state, step) as weights:
                self.validator.generate_images(step, transformer, weights)
        if step == self.last_step:
            with (
                average()
                if average is not None and self.ema_validation == "ema_only"
                else nullcontext()
            ):
                for strength in self.validator.extra_strengths:
                    with at_lora_strength(self.train_state, strength):
                        self.validator.generate_images(step, transformer, strength_label(strength))


@dataclass
class ScoringCallback:
    """Scores the untouched base at step 0, then what is kept: the average where there is one."""

    scorer: Scorer
    train_state: TrainState

    def score(self, step: int) -> None:
        with evaluation_weights(self.train_state, step) as weights:
            self.scorer.score(step, self.train_state.transformer, weights)


@dataclass
class HeldOutLossCallback:
    """Measures held-out loss; with an EMA, of the averaged weights, since those are what is kept."""

    evaluator: HeldOutEvaluator
    train_state: TrainState
    run_dir: Path
    emit: Emit

    def evaluate(self, step: int) -> None:
        if step == self.evaluator.last_step:
            return
        average = None if step == BASE_STEP else self.train_state.averaged_weights
        # What this training changes is told: a LoRA that it goes on from belongs to the start.
        with nullcontext() if average is None else average():
            self.evaluator.evaluate(self.train_state.transformer, step, self.emit)

    def best_step(self) -> int | None:
        return self.evaluator.best_step

    def report_best_step(self, step: int) -> None:
        """Say where to stop."""
        best, loss = self.evaluator.best_step, self.evaluator.best_loss
        if best is not None:
            kept = self.run_dir / f"checkpoint-{best}"
            found = (
                f": {kept}"
                if kept.is_dir()
                else "; training did not lower it"
                if best == BASE_STEP
                else ""
            )
            self.emit(NoticeIssued(f"lowest held-out loss {loss:.4f} at step {best}{found}"))


def build_held_out_evaluator(
    run: RunConfig, prepared: PreparedInputs, inference: Inference
) -> HeldOutEvaluator | None:
    """The eval sets and an equally large frozen part of the training set; None without an eval set."""
    wanted = run.validation.eval_dataset_id
    chosen = select_samples(prepared.eval, lambda item: wanted in (None, item.sample.dataset))
    if not chosen.placed_samples:
        return None
    count = min(run.validation.num_eval_images, len(chosen.placed_samples))
    sets = [
        make_held_out_set(run, prepared, chosen, "eval", count),
        make_held_out_set(
            run, prepared, prepared.train, "train", min(count, len(prepared.train.placed_samples))
        ),
    ]
    return HeldOutEvaluator(inference, sets, run.validation.eval_sigma_count, run.training.seed)


def make_held_out_set(
    run: RunConfig, prepared: PreparedInputs, filled: LatentCacheResult, split: str, count: int
) -> HeldOutSet:
    seed, placed = run.training.seed, filled.placed_samples
    micro = fixed_batches(
        placed, choose_samples(placed, count, seed), max(run.training.train_batch_size, 4)
    )
    batches = prepared.make_batches(filled, "mean", seed)
    name = ", ".join(sorted({item.sample.dataset for item in placed}))
    return HeldOutSet(split, name, count, lambda: (batches.load(one) for one in micro))
