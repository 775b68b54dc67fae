"""Prompts, training images and the evaluation model for the scores of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from simpletuner.config.evaluation_models import needs_evaluation_model
from simpletuner.config.image_metrics import parse_metric_names
from simpletuner.config.schema import RunConfig, trigger_word
from simpletuner.data.pixels import load_pixels
from simpletuner.data.sample_types import BucketedSample
from simpletuner.events.event_types import Emit
from simpletuner.models.weights.evaluation_files import locate_evaluation_model
from simpletuner.validation.held_out_loss import choose_samples
from simpletuner.validation.image_scoring import SAMPLES_PER_PROMPT, EvaluationPrompts
from simpletuner.validation.prompt_library import library_prompts
from simpletuner.validation.prompts import parse_sizes, read_prompts

REFERENCE_IMAGES = 64  # training images that likeness compares with, or fewer where there are fewer


def read_metric_prompts(
    run: RunConfig, base_dir: Path, alignment_px: int, emit: Emit
) -> EvaluationPrompts | None:
    """Return what the metrics with an evaluation model need; None if there are none.

    The prompts are those of the validation images, else the built-in ones; the size is the first
    one of the validation images. The model is downloaded if it is not cached. Raises ConfigError
    for a model that cannot score.
    """
    options = run.validation
    if not needs_evaluation_model(options.evaluation_type):
        return None
    folder = locate_evaluation_model(
        options.pretrained_evaluation_model_name_or_path, options.evaluation_type, emit
    )
    trigger = trigger_word(run)
    prompts = read_prompts(options, base_dir, trigger)
    sizes, _ = parse_sizes(options.validation_resolution, run.data, alignment_px)
    has_samples = "diversity" in parse_metric_names(options.evaluation_type)
    return EvaluationPrompts(
        prompts or library_prompts(trigger, options.validation_negative_prompt),
        sizes[0],
        run.training.seed if options.validation_seed is None else options.validation_seed,
        SAMPLES_PER_PROMPT if has_samples else 1,
        folder,
        emit,
        library_prompts("", options.validation_negative_prompt),
    )


def reference_loader(
    run: RunConfig, placed: Sequence[BucketedSample]
) -> Callable[[], tuple[Image.Image, ...]]:
    """Return the function that decodes the training images to compare with, as they are trained.

    They are chosen by a hash of their ids, the same ones at every step.
    """
    count = min(REFERENCE_IMAGES, len(placed))
    chosen = choose_samples(placed, count, run.training.seed)

    def load() -> tuple[Image.Image, ...]:
        return tuple(Image.fromarray(load_pixels(placed[index], run.data)) for index in chosen)

    return load
