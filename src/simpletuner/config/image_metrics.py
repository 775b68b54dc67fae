"""The image metrics that evaluation_type offers, declared once and without torch.

The rules read the names and the bases from here, the memory plan reads the device memory, and
validation/image_scoring.py adds the code of each metric under the same name. A test compares the
two tables.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageMetricSpec:
    """Facts about one metric.

    unit: of its values; "share" (of 1, printed as a percentage) or a name that is printed after the
    number, such as "similarity". default_prompts: how many prompts it scores when its options do
    not say. needs_device: whether it runs a model of its own on the accelerator. device_bytes: the
    memory of that model, which is on the device together with the training. nano_only: whether it
    can read only the images of chroma-nano's world. models: the kinds of model that it can use, by
    model_type; the metrics share one model, which is on the device only while it scores.
    options: its options of the validation section.
    """

    unit: str
    default_prompts: int
    needs_device: bool = False
    device_bytes: int = 0
    nano_only: bool = False
    models: tuple[str, ...] = ()
    options: tuple[str, ...] = ("evaluation_prompts",)


MODEL_OPTIONS = ("evaluation_prompts", "pretrained_evaluation_model_name_or_path")
IMAGE_METRICS: dict[str, ImageMetricSpec] = {
    "clip": ImageMetricSpec("similarity", 40, True, models=("clip",), options=MODEL_OPTIONS),
    "retention": ImageMetricSpec("similarity", 40, True, models=("clip",), options=MODEL_OPTIONS),
    "likeness": ImageMetricSpec(
        "similarity", 40, True, models=("clip", "dinov2"), options=MODEL_OPTIONS
    ),
    "diversity": ImageMetricSpec(
        "distance", 10, True, models=("clip", "dinov2"), options=MODEL_OPTIONS
    ),
    "shapes": ImageMetricSpec(unit="share", default_prompts=64, nano_only=True),
    "zorbo": ImageMetricSpec(unit="share", default_prompts=32, nano_only=True),
}


# Metrics of what the base could do before the training, which is compared at the end.
RETENTION_METRICS = ("retention", "shapes")


def parse_metric_names(evaluation_type: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list, each once, without "none"."""
    names = dict.fromkeys(name.strip() for name in evaluation_type.split(","))
    return tuple(name for name in names if name != "none")


def metric_device_bytes(evaluation_type: str) -> int:
    """Return the device memory that the models of the chosen metrics need together."""
    return sum(IMAGE_METRICS[name].device_bytes for name in parse_metric_names(evaluation_type))
