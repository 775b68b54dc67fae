"""Metrics that compare embeddings of images: with the prompt, the training images, each other.

They say nothing about beauty. Their values depend on the evaluation model, so only values of the
same model and the same prompts can be compared: those of the base and of each checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from simpletuner.events.event_types import Emit, WarningIssued
from simpletuner.validation.evaluation_model import EvaluationModel, use_evaluation_model
from simpletuner.validation.prompts import ImageSpec
from simpletuner.validation.shapes.scene_scoring import Rate

# From the images, in the order of the specs, and the training images to values by name.
ScoreImages = Callable[
    [EvaluationModel, Sequence[ImageSpec], Sequence[Image.Image], Sequence[Image.Image]],
    Mapping[str, Rate],
]


def text_agreement(
    model: EvaluationModel,
    specs: Sequence[ImageSpec],
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
) -> Mapping[str, Rate]:
    """Return the cosine of each image with its own prompt (CLIP score, Hessel et al. 2021)."""
    texts = list(dict.fromkeys(spec.prompt.text for spec in specs))
    directions = dict(zip(texts, model.embed_texts(texts), strict=True))
    wanted = torch.stack([directions[spec.prompt.text] for spec in specs])
    cosines = (model.embed_images(images) * wanted).sum(1)
    return {"mean": mean_over_prompts(specs, cosines)}


def likeness_to_references(
    model: EvaluationModel,
    specs: Sequence[ImageSpec],
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
) -> Mapping[str, Rate]:
    """Return the cosine with the training images: the mean of all, and the nearest one.

    The mean is that of DreamBooth (Ruiz et al. 2023: CLIP-I, DINO). A nearest one that rises
    towards 1 is a training image that is repeated.
    """
    cosines = model.embed_images(images) @ model.embed_images(references).T
    return {
        "mean": mean_over_prompts(specs, cosines.mean(1)),
        "nearest": mean_over_prompts(specs, cosines.amax(1)),
    }


def diversity_of_samples(
    model: EvaluationModel,
    specs: Sequence[ImageSpec],
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
) -> Mapping[str, Rate]:
    """Return 1 - cosine between the samples of a prompt, the mean over all pairs."""
    rows = group_by_prompt(specs)
    embedded = model.embed_images(images)
    values = []
    for members in rows.values():
        own = embedded[members]
        pairs = torch.triu_indices(len(members), len(members), offset=1)
        values.append(float(1 - (own[pairs[0]] * own[pairs[1]]).sum(1).mean()))
    return {"mean": mean_of(values)}


def group_by_prompt(specs: Sequence[ImageSpec]) -> dict[str, list[int]]:
    """Return the places of the images of each prompt id."""
    rows: dict[str, list[int]] = {}
    for place, spec in enumerate(specs):
        rows.setdefault(spec.prompt.id, []).append(place)
    return rows


def mean_over_prompts(specs: Sequence[ImageSpec], values: Tensor) -> Rate:
    """Return the mean over prompts and its standard error; samples of a prompt are one value."""
    return mean_of([float(values[members].mean()) for members in group_by_prompt(specs).values()])


def mean_of(values: Sequence[float]) -> Rate:
    """Return the mean with its standard error, which is 0 for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Rate(statistics.fmean(values), error, len(values), tuple(values))


def make_score(
    score_images: ScoreImages,
    specs: Sequence[ImageSpec],
    folder: Path,
    device: torch.device,
    emit: Emit,
) -> Callable[..., Mapping[str, Rate]]:
    """Return the function that loads the model, scores images, and releases it."""
    warned: set[str] = set()

    def score(
        images: Sequence[Image.Image], references: Sequence[Image.Image] = ()
    ) -> Mapping[str, Rate]:
        def use(model: EvaluationModel) -> Mapping[str, Rate]:
            if score_images is text_agreement:
                warn_of_long_prompts(model, specs, warned, emit)
            return score_images(model, specs, images, references)

        return use_evaluation_model(folder, device, use)

    return score


def warn_of_long_prompts(
    model: EvaluationModel, specs: Sequence[ImageSpec], warned: set[str], emit: Emit
) -> None:
    """Warn once of each prompt of which the model reads only the beginning."""
    texts = {spec.prompt.id: spec.prompt.text for spec in specs}
    long = [
        name
        for name, text in texts.items()
        if name not in warned and model.count_tokens(text) > model.max_tokens
    ]
    warned.update(long)
    if long:
        prompts = "this prompt is" if len(long) == 1 else "these prompts are"
        emit(
            WarningIssued(
                f"clip reads {model.max_tokens} tokens, and {prompts} longer, so the end is not "
                f"scored: {', '.join(long)}"
            )
        )
