"""What is done between steps with the weights of the moment: pictures, held-out loss, scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from simpletuner.cache.latents import Filled
from simpletuner.config.schema import RunConfig
from simpletuner.events.types import Emit, Noted
from simpletuner.training.prepare import Prepared, part
from simpletuner.training.trainee import Trainee
from simpletuner.validation.component import BASE_STEP, Validator, at
from simpletuner.validation.heldout import HeldOut, HeldOutSet, choose, fixed_batches
from simpletuner.validation.inference import Inference
from simpletuner.validation.scores import Scorer


@contextmanager
def at_strength(net: Trainee, strength: float) -> Iterator[None]:
    """The LoRA at that strength inside, at its own after."""
    net.set_strength(strength)
    try:
        yield
    finally:
        net.set_strength(1.0)


@contextmanager
def kept(net: Trainee, step: int) -> Iterator[str]:
    """What the weights inside are called: the untouched base at step 0, then the average if there is one."""
    if step == BASE_STEP:
        with at_strength(net, 0.0):
            yield "base"
    elif net.average is not None:
        with net.average():
            yield "ema"
    else:
        yield "trained"


@dataclass
class Pictures:
    """Draws at a step: the untouched base at step 0, then the trained weights, their average, or both.

    last_step: where the LoRA is drawn at the validator's other strengths too.
    """

    validator: Validator
    net: Trainee
    which: str
    last_step: int

    def draw(self, step: int) -> None:
        average, transformer = self.net.average, self.net.transformer
        if step != BASE_STEP and average is not None and self.which != "ema_only":
            self.validator.run(step, transformer, "trained")
        if step == BASE_STEP or average is None or self.which != "none":
            with kept(self.net, step) as weights:
                self.validator.run(step, transformer, weights)
        if step == self.last_step:
            with average() if average is not None and self.which == "ema_only" else nullcontext():
                for strength in self.validator.strengths:
                    with at_strength(self.net, strength):
                        self.validator.run(step, transformer, at(strength))


@dataclass
class Scoring:
    """Scores the untouched base at step 0, then what is kept: the average where there is one."""

    scorer: Scorer
    net: Trainee

    def run(self, step: int) -> None:
        with kept(self.net, step) as weights:
            self.scorer.run(step, self.net.transformer, weights)


@dataclass
class Evaluation:
    """Measures held-out loss; with an EMA, of the averaged weights, since those are what is kept."""

    heldout: HeldOut
    net: Trainee
    run_dir: Path
    emit: Emit

    def run(self, step: int) -> None:
        if step == self.heldout.last_step:
            return
        average = None if step == BASE_STEP else self.net.average
        # What this training changes is told: a LoRA that it goes on from belongs to the start.
        with nullcontext() if average is None else average():
            self.heldout.run(self.net.transformer, step, self.emit)

    def best_step(self) -> int | None:
        return self.heldout.best_step

    def conclude(self, step: int) -> None:
        """Say where to stop."""
        best, loss = self.heldout.best_step, self.heldout.best_loss
        if best is not None:
            kept = self.run_dir / f"checkpoint-{best}"
            found = (
                f": {kept}" if kept.is_dir() else "; training did not lower it" if best == BASE_STEP else ""
            )
            self.emit(Noted(f"lowest held-out loss {loss:.4f} at step {best}{found}"))


def heldout_of(run: RunConfig, prepared: Prepared, inference: Inference) -> HeldOut | None:
    """The eval sets and an equally large frozen part of the training set; None without an eval set."""
    wanted = run.validation.eval_dataset_id
    chosen = part(prepared.eval, lambda item: wanted in (None, item.sample.dataset))
    if not chosen.placed:
        return None
    count = min(run.validation.num_eval_images, len(chosen.placed))
    sets = [
        one_set(run, prepared, chosen, "eval", count),
        one_set(run, prepared, prepared.train, "train", min(count, len(prepared.train.placed))),
    ]
    return HeldOut(inference, sets, run.validation.eval_sigma_count, run.training.seed)


def one_set(run: RunConfig, prepared: Prepared, filled: Filled, split: str, count: int) -> HeldOutSet:
    seed, placed = run.training.seed, filled.placed
    micro = fixed_batches(placed, choose(placed, count, seed), max(run.training.train_batch_size, 4))
    batches = prepared.batches(filled, "mean", seed)
    name = ", ".join(sorted({item.sample.dataset for item in placed}))
    return HeldOutSet(split, name, count, lambda: (batches.load(one) for one in micro))
