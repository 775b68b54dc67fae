"""The models that score images, and which metric can use which; without torch."""

from __future__ import annotations

import json
from pathlib import Path

from simpletuner.bounded_files import read_bounded_text
from simpletuner.config.image_metrics import IMAGE_METRICS, parse_metric_names

DEFAULT_EVALUATION_MODEL = "openai/clip-vit-large-patch14"
DEFAULT_MODEL_BYTES = 1_710_540_580  # of its model.safetensors, in float32
# model_type in config.json -> title. Others would need code of their own, or remote code.
MODEL_TITLES = {"clip": "CLIP", "dinov2": "DINOv2"}


def needs_evaluation_model(evaluation_type: str) -> bool:
    """Return whether one of the metrics runs a model of its own."""
    names = parse_metric_names(evaluation_type)
    return any(IMAGE_METRICS[name].models for name in names if name in IMAGE_METRICS)


def read_model_type(folder: Path) -> str:
    """Return the model_type of a folder's config.json; "" where there is none."""
    try:
        config = json.loads(read_bounded_text(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def find_model_problem(name: str, folder: Path, evaluation_type: str) -> str | None:
    """Return why the model in this folder cannot score these metrics; None if it can."""
    kind = read_model_type(folder)
    if kind not in MODEL_TITLES:
        content = f"is a model of type {kind!r}" if kind else "has no config.json with a model_type"
        return f"{name} {content}; scores are computed by CLIP or DINOv2"
    for metric in parse_metric_names(evaluation_type):
        models = IMAGE_METRICS[metric].models if metric in IMAGE_METRICS else ()
        if models and kind not in models:
            return (
                f"{name} is {MODEL_TITLES[kind]}, which reads no text, so it cannot score "
                f"{metric}; use a CLIP model, or leave {metric} out of evaluation_type"
            )
    return None
