"""What a program reads from a run's pictures of prompts that nobody trained on: rates of what is right.

A metric brings its own prompts and its own eyes. It is no judge of beauty and needs no second model: either
a picture has what its prompt says, or it has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from simpletuner.config.schema import ValidationOptions
from simpletuner.events.event_types import Emit, ScoresComputed
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.validation.inference import Inference
from simpletuner.validation.prompts import ImageSpec, Prompt, prompt_texts
from simpletuner.validation.sampler import MAX_BATCH_IMAGES, generate_latents
from simpletuner.validation.shapes import scene_scoring
from simpletuner.validation.shapes.detection import detect_scene
from simpletuner.validation.shapes.scene_scoring import Rate
from simpletuner.validation.shapes.scenes import SIDE_PX, Scene
from simpletuner.validation.shapes.zorbo import detect_zorbo
from simpletuner.validation.validation_images import pixels_to_image


@dataclass(frozen=True)
class Metric:
    """One way to score. name: as evaluation_type says it. pictures: what it wants drawn, always the same.

    judge: the rates of the pictures, given in that order.
    """

    name: str
    image_specs: tuple[ImageSpec, ...]
    score: Callable[[Sequence[Image.Image]], Mapping[str, Rate]]


def _scene_image_specs(scenes: Sequence[Scene]) -> tuple[ImageSpec, ...]:
    """A scene's number is its noise's, so the first prompts of many are those of few."""
    return tuple(
        ImageSpec(
            Prompt(f"{number:03d}", scene.caption),
            0,
            (SIDE_PX, SIDE_PX),
            scene_scoring.NOISE_SEED + number,
        )
        for number, scene in enumerate(scenes)
    )


def shapes_metric(count: int | None) -> Metric:
    """Chroma-nano's own world, in captions that no picture of its training has. None: 64 prompts."""
    scenes, new = scene_scoring.unseen_scenes(count or 64)

    def judge(drawn: Sequence[Image.Image]) -> Mapping[str, Rate]:
        asked = zip(scenes, drawn, new, strict=True)
        return scene_scoring.compute_rates(
            [
                scene_scoring.score_scene(scene, detect_scene(picture), fresh)
                for scene, picture, fresh in asked
            ]
        )

    return Metric("shapes", _scene_image_specs(scenes), judge)


def zorbo_metric(count: int | None) -> Metric:
    """The example's concept, in prompts that are not the example's. None: 32 prompts."""
    scenes = scene_scoring.unseen_zorbo_scenes(count or 32)

    def judge(drawn: Sequence[Image.Image]) -> Mapping[str, Rate]:
        asked = zip(scenes, drawn, strict=True)
        return scene_scoring.compute_rates(
            [
                scene_scoring.score_zorbo_scene(scene, detect_zorbo(picture))
                for scene, picture in asked
            ]
        )

    return Metric("zorbo", _scene_image_specs(scenes), judge)


METRICS: dict[str, Callable[[int | None], Metric]] = {
    "shapes": shapes_metric,
    "zorbo": zorbo_metric,
}


def choose_metrics(options: ValidationOptions) -> tuple[Metric, ...]:
    """The metrics of evaluation_type, each once."""
    names = dict.fromkeys(name.strip() for name in options.evaluation_type.split(","))
    return tuple(METRICS[name](options.evaluation_prompts) for name in names if name != "none")


def metric_texts(metrics: Sequence[Metric], guidance: float) -> tuple[str, ...]:
    """Every text that must be encoded before the metrics can be drawn."""
    return prompt_texts(
        [picture.prompt for metric in metrics for picture in metric.image_specs], guidance
    )


@dataclass
class Scorer:
    """Draws what the metrics ask for, in memory, and tells what they read.

    rows, decoder: as Validator has them; the VAE is held only while it decodes.
    """

    inference: Inference
    metrics: Sequence[Metric]
    steps: int
    guidance: float
    text_embedding: Callable[[str], Tensor]
    load_decoder: Callable[[], Callable[[Tensor], Tensor]]
    emit: Emit
    _last_scored_step: dict[str, int] = field(default_factory=dict, init=False)

    def score(self, step: int, transformer: nn.Module, weights: str) -> None:
        """Score the weights that are in the transformer now, once a step. weights: what they are."""
        for metric in self.metrics:
            if self._last_scored_step.get(metric.name) == step:
                continue
            rates = metric.score(self._generate_images(metric, transformer))
            told = {name: (one.rate, one.standard_error, one.total) for name, one in rates.items()}
            self.emit(ScoresComputed(step, metric.name, weights, len(metric.image_specs), told))
            self._last_scored_step[metric.name] = step

    def _generate_images(self, metric: Metric, transformer: nn.Module) -> list[Image.Image]:
        """Latents of all first, which weigh little; then they are decoded in batches."""
        latents, how = [], (self.inference, transformer, metric.image_specs, self.text_embedding)
        with StageReporter(
            self.emit, f"score {metric.name}", len(metric.image_specs), "pictures"
        ) as stage:
            for _, one in generate_latents(*how, steps=self.steps, guidance=self.guidance):
                latents.append(torch.nan_to_num(one))
                stage.advance()
            decode = self.load_decoder()
            return [
                pixels_to_image(pixels)
                for start in range(0, len(latents), MAX_BATCH_IMAGES)
                for pixels in decode(torch.cat(latents[start : start + MAX_BATCH_IMAGES])).split(1)
            ]

    def state_dict(self) -> dict[str, object]:
        """JSON-able: the last step of each metric, so that a resumed run repeats none."""
        return {"done": self._last_scored_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last_scored_step = dict(state["done"])
