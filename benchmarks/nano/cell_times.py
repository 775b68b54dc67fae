"""What a cell should take, to say when all is done."""

from __future__ import annotations

from benchmarks.nano import preservation
from benchmarks.nano.experiments import FULL_EXPERIMENT, Cell, ExperimentSize

# Seconds of one core while the other is as busy: to start, per sample of a training step, of a
# held-out loss, per step of a picture and to decode it; how much dearer padded rows are; muon's
# part of a step.
START_S, SAMPLE_STEP_S, HELD_OUT_S, IMAGE_STEP_S, IMAGE_DECODE_S = 11.0, 0.026, 0.009, 0.0135, 0.055
PADDED_STEP_FACTOR, PADDED_FORWARD_FACTOR, MUON_STEP_S, SHAPES_DATASET_S = 8.0, 5.6, 0.15, 150.0


def estimate_seconds(cell: Cell, size: ExperimentSize) -> float:
    """Return the seconds of one core for a cell."""
    variant = cell.variant
    if variant.program == "world":
        return START_S + SHAPES_DATASET_S * size.pictures / FULL_EXPERIMENT.pictures
    scratch, padded = variant.data == "shapes", variant.program == "padded"

    def number(option: str, default: int) -> int:
        return int(str(variant.options.get(option, default)))

    steps = number("max_train_steps", size.scratch_steps if scratch else size.lesson_steps)
    batch = number("train_batch_size", size.scratch_batch if scratch else size.lesson_batch)
    sample_s = SAMPLE_STEP_S * preservation.step_cost(variant.name)
    sample_s *= PADDED_STEP_FACTOR if padded else 1
    training = steps * (batch * sample_s + (MUON_STEP_S if scratch else 0))
    forward = PADDED_FORWARD_FACTOR if padded else 1.0
    unseen = number("num_eval_images", size.unseen)
    measuring = 2 * 2 * unseen * size.sigmas * HELD_OUT_S * forward
    metrics = {"none": 0, "zorbo": 1}.get(
        str(variant.options.get("evaluation_type")), 1 if scratch else 2
    )
    sampling_steps = number("validation_num_inference_steps", size.sampling_steps)
    picture = sampling_steps * IMAGE_STEP_S * forward + IMAGE_DECODE_S
    return (
        START_S
        + training
        + measuring
        + metrics * number("evaluation_prompts", size.prompts) * picture
    )
