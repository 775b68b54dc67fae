"""Rules between the options of validation images and scores."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from simpletuner.config.evaluation_models import find_model_problem, needs_evaluation_model
from simpletuner.config.image_metrics import IMAGE_METRICS
from simpletuner.config.schema import RunConfig, ValidationOptions

RESOLUTION_PATTERN = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


def find_validation_errors(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield each option that cannot be used as given, and why."""
    for size in (run.validation.validation_resolution or "").replace(" ", "").split(","):
        match = RESOLUTION_PATTERN.fullmatch(size)
        if size and (match is None or any(int(side) < 64 for side in match.groups() if side)):
            yield (
                "validation_resolution",
                f'{size!r} is not a size; write "512" or "512x768" (pixels, at least 64)',
            )
    yield from _check_metrics(run)


def _check_metrics(run: RunConfig) -> Iterator[tuple[str, str]]:
    options = run.validation
    names = [name.strip() for name in options.evaluation_type.split(",")]
    for name in names:
        if name not in IMAGE_METRICS and names != ["none"]:
            yield (
                "evaluation_type",
                f"{name!r} is not supported; allowed: none, or a list of "
                f"{', '.join(IMAGE_METRICS)}",
            )
    base = run.model.pretrained_model_name_or_path
    # A local base is accepted too: it may be one of chroma-nano's kind.
    is_scorable = run.model.model_flavour == "nano" or (base is not None and Path(base).is_dir())
    own_world = [name for name in names if name in IMAGE_METRICS and IMAGE_METRICS[name].nano_only]
    if own_world and not is_scorable:
        yield (
            "evaluation_type",
            f"{', '.join(own_world)} scores images of chroma-nano's world; use model_flavour nano, "
            "a local folder with such a model, or clip, likeness and diversity",
        )
    yield from _check_evaluation_model(options)


def _check_evaluation_model(options: ValidationOptions) -> Iterator[tuple[str, str]]:
    """Check a model that is on this disk; another one is checked before its weights are loaded."""
    name = options.pretrained_evaluation_model_name_or_path
    if name is None:
        return
    if not needs_evaluation_model(options.evaluation_type):
        if options.evaluation_type != "none":
            yield (
                "pretrained_evaluation_model_name_or_path",
                f"is used by clip, likeness and diversity, not by {options.evaluation_type}",
            )
    elif Path(name).is_dir():
        problem = find_model_problem(name, Path(name), options.evaluation_type)
        if problem is not None:
            yield "pretrained_evaluation_model_name_or_path", problem
