"""Image metrics: scores that a program computes from images of prompts that are not trained on.

A metric has its own prompts and its own way to read an image. shapes and zorbo need no second
model: an image either shows what its prompt asks for, or it does not. clip, likeness and diversity
(model_metrics.py) compare embeddings of a second model. None measures beauty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from simpletuner.cache.batch_types import TextEmbedding
from simpletuner.config.image_metrics import (
    IMAGE_METRICS,
    RETENTION_METRICS,
    ImageMetricSpec,
    parse_metric_names,
)
from simpletuner.config.schema import ValidationOptions
from simpletuner.events.event_types import Emit, KnowledgeCompared, ScoresComputed
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.peers import ALONE, Peers
from simpletuner.validation.convergence import paired_change
from simpletuner.validation.inference import Inference
from simpletuner.validation.model_metrics import (
    ScoreImages,
    diversity_of_samples,
    likeness_to_references,
    make_score,
    text_agreement,
)
from simpletuner.validation.prompts import ImageSpec, Prompt, make_image_specs, prompt_texts
from simpletuner.validation.sampler import MAX_BATCH_IMAGES, generate_latents
from simpletuner.validation.shapes import scene_scoring
from simpletuner.validation.shapes.detection import detect_scene
from simpletuner.validation.shapes.scene_scoring import Rate
from simpletuner.validation.shapes.scenes import SIDE_PX, Scene
from simpletuner.validation.shapes.zorbo import detect_zorbo
from simpletuner.validation.validation_images import gather_images, pixels_to_image

SAMPLES_PER_PROMPT = 4  # where diversity is measured


@dataclass(frozen=True)
class EvaluationPrompts:
    """The prompts of a run, for metrics that have none of their own.

    samples: images per prompt, with consecutive seeds. folder: of the evaluation model. emit: for
    warnings.
    """

    prompts: tuple[Prompt, ...]
    size_px: tuple[int, int]
    seed: int
    samples: int
    folder: Path
    emit: Emit
    base_prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class MetricInputs:
    """The inputs of a metric.

    options: the values of the options that its row of IMAGE_METRICS names. device: where its model
    runs; None for a metric that needs no device. prompts: None for a metric with its own prompts.
    """

    spec: ImageMetricSpec
    options: Mapping[str, Any]
    device: torch.device | None
    prompts: EvaluationPrompts | None = None

    @property
    def prompt_count(self) -> int:
        return self.options["evaluation_prompts"] or self.spec.default_prompts


@dataclass(frozen=True)
class Metric:
    """One way to score images.

    name: as in evaluation_type. unit: of the values. image_specs: the images to generate, the same
    at every step. score: values by name from the images, given in the order of image_specs, and,
    with uses_references, from training images.
    """

    name: str
    unit: str
    image_specs: tuple[ImageSpec, ...]
    score: Callable[..., Mapping[str, Rate]]
    uses_references: bool = False


def _scene_image_specs(scenes: Sequence[Scene]) -> tuple[ImageSpec, ...]:
    """Return one image per scene.

    The number of a scene gives the seed of its noise, so the images of a short list are the first
    images of a long one.
    """
    return tuple(
        ImageSpec(
            Prompt(f"{number:03d}", scene.caption),
            0,
            (SIDE_PX, SIDE_PX),
            scene_scoring.NOISE_SEED + number,
        )
        for number, scene in enumerate(scenes)
    )


def shapes_metric(inputs: MetricInputs) -> Metric:
    """Score scenes of chroma-nano's own world, with captions that its training never had."""
    scenes, are_new = scene_scoring.unseen_scenes(inputs.prompt_count)

    def score(images: Sequence[Image.Image]) -> Mapping[str, Rate]:
        return scene_scoring.compute_rates(
            [
                scene_scoring.score_scene(scene, detect_scene(image), is_new)
                for scene, image, is_new in zip(scenes, images, are_new, strict=True)
            ]
        )

    return Metric("shapes", inputs.spec.unit, _scene_image_specs(scenes), score)


def zorbo_metric(inputs: MetricInputs) -> Metric:
    """Score the concept of the packaged example, in prompts that the example does not train on."""
    scenes = scene_scoring.held_out_zorbo_scenes(inputs.prompt_count)

    def score(images: Sequence[Image.Image]) -> Mapping[str, Rate]:
        return scene_scoring.compute_rates(
            [
                scene_scoring.score_zorbo_scene(scene, detect_zorbo(image))
                for scene, image in zip(scenes, images, strict=True)
            ]
        )

    return Metric("zorbo", inputs.spec.unit, _scene_image_specs(scenes), score)


def model_metric(
    name: str, score_images: ScoreImages, uses_references: bool = False, of_base: bool = False
) -> Callable[[MetricInputs], Metric]:
    """Return the builder of a metric that scores the run's prompts with the evaluation model."""

    def build(inputs: MetricInputs) -> Metric:
        run = inputs.prompts
        if run is None or inputs.device is None:
            raise ValueError(f"{name} needs prompts, an evaluation model and a device")
        prompts = (run.base_prompts if of_base else run.prompts)[: inputs.prompt_count]
        specs = make_image_specs(prompts, [run.size_px], run.samples, run.seed)
        score = make_score(score_images, specs, run.folder, inputs.device, run.emit)
        return Metric(name, inputs.spec.unit, specs, score, uses_references)

    return build


# The code of each metric; IMAGE_METRICS has its unit, memory and options under the same name.
METRICS: dict[str, Callable[[MetricInputs], Metric]] = {
    "clip": model_metric("clip", text_agreement),
    "retention": model_metric("retention", text_agreement, of_base=True),
    "likeness": model_metric("likeness", likeness_to_references, uses_references=True),
    "diversity": model_metric("diversity", diversity_of_samples),
    "shapes": shapes_metric,
    "zorbo": zorbo_metric,
}


def choose_metrics(
    options: ValidationOptions, device: torch.device, prompts: EvaluationPrompts | None = None
) -> tuple[Metric, ...]:
    """Build the metrics of evaluation_type, each once. device, prompts: for those that need any."""
    values = options.model_dump()
    metrics = []
    for name in parse_metric_names(options.evaluation_type):
        spec = IMAGE_METRICS[name]
        own_options = {option: values[option] for option in spec.options}
        own_device = device if spec.needs_device else None
        own_prompts = prompts if spec.models else None
        metrics.append(METRICS[name](MetricInputs(spec, own_options, own_device, own_prompts)))
    return tuple(metrics)


def metric_texts(metrics: Sequence[Metric], guidance: float) -> tuple[str, ...]:
    """Return every text that must be encoded before the images of the metrics can be generated."""
    return prompt_texts(
        [image_spec.prompt for metric in metrics for image_spec in metric.image_specs], guidance
    )


def compare_knowledge(step: int, metric: Metric, before: Rate, now: Rate) -> KnowledgeCompared:
    """Compare a score with that of the base; pair the prompts where both have the same number."""
    error = None
    if before.by_prompt and len(before.by_prompt) == len(now.by_prompt):
        baseline = {str(place): value for place, value in enumerate(before.by_prompt)}
        values = {str(place): value for place, value in enumerate(now.by_prompt)}
        _, error = paired_change(values, baseline)
    return KnowledgeCompared(
        step,
        metric.name,
        before.rate,
        before.standard_error,
        now.rate,
        now.standard_error,
        metric.unit,
        error,
    )


@dataclass
class MetricEvaluator:
    """Generates the images of the metrics in memory and emits their scores.

    text_embedding: a text to its named tensors. load_decoder: loads the VAE, which is in memory
    only while it decodes. load_references: decodes the training images that images are compared
    with. Metrics with the same images share them. Several processes share out the images; the main
    one scores them.
    """

    inference: Inference
    metrics: Sequence[Metric]
    steps: int
    guidance: float
    text_embedding: Callable[[str], TextEmbedding]
    load_decoder: Callable[[], Callable[[Tensor], Tensor]]
    emit: Emit
    peers: Peers = ALONE
    load_references: Callable[[], Sequence[Image.Image]] = tuple
    _last_scored_step: dict[str, int] = field(default_factory=dict, init=False)
    _before: dict[str, Rate] = field(default_factory=dict, init=False)

    def score(self, step: int, transformer: nn.Module, weights: str) -> None:
        """Score the weights that are in the transformer now; does nothing if the step was scored.

        weights: the name of these weights, "base", "trained" or "ema".
        """
        generated: dict[tuple[ImageSpec, ...], list[Image.Image]] = {}
        for metric in self.metrics:
            if self._last_scored_step.get(metric.name) == step:
                continue
            specs = tuple(metric.image_specs)
            if specs not in generated:
                generated[specs] = self._generate_images(metric, transformer)
            if self.peers.is_main:
                self._score_images(metric, generated[specs], step, weights)
            self._last_scored_step[metric.name] = step

    def _score_images(
        self, metric: Metric, images: list[Image.Image], step: int, weights: str
    ) -> None:
        """Score the images of one metric and emit the values."""
        inputs = (images, self.load_references()) if metric.uses_references else (images,)
        scores = metric.score(*inputs)
        rates = {
            name: (rate.rate, rate.standard_error, rate.total) for name, rate in scores.items()
        }
        prompts = len({spec.prompt.id for spec in metric.image_specs})
        self.emit(ScoresComputed(step, metric.name, weights, prompts, rates, metric.unit))
        if metric.name in RETENTION_METRICS and scores:
            now = scores.get("all") or next(iter(scores.values()))
            if step == 0:
                self._before.setdefault(metric.name, now)
            elif metric.name in self._before:
                self.emit(compare_knowledge(step, metric, self._before[metric.name], now))

    def _generate_images(self, metric: Metric, transformer: nn.Module) -> list[Image.Image]:
        """Return the images of all processes, each of which generates and decodes a share."""
        own = []
        with StageReporter(
            self.emit, f"score {metric.name}", len(metric.image_specs), "pictures"
        ) as stage:
            # All latents first, which are small; the VAE is then loaded once.
            generated = []
            for image_spec, latents in generate_latents(
                self.inference,
                transformer,
                metric.image_specs,
                self.text_embedding,
                steps=self.steps,
                guidance=self.guidance,
                peers=self.peers,
            ):
                generated.append((image_spec, torch.nan_to_num(latents)))
                stage.advance()
            decode = self.load_decoder() if generated else None
            for _, group in groupby(generated, key=lambda pair: pair[0].size_px):
                same_size = [latents for _, latents in group]
                for start in range(0, len(same_size), MAX_BATCH_IMAGES):
                    batch = torch.cat(same_size[start : start + MAX_BATCH_IMAGES])
                    assert decode is not None
                    own += [pixels_to_image(pixels) for pixels in decode(batch).split(1)]
        return gather_images(own, self.peers)

    def state_dict(self) -> dict[str, object]:
        """Return the last scored step of each metric, so that a resumed run repeats none (JSON)."""
        return {
            "done": self._last_scored_step,
            "before": {
                name: (rate.rate, rate.standard_error) for name, rate in self._before.items()
            },
            "before_by_prompt": {name: rate.by_prompt for name, rate in self._before.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last_scored_step = dict(state["done"])
        by_prompt = state.get("before_by_prompt", {})
        self._before = {}
        # Checkpoints of earlier versions have neither.
        for name, (value, error) in state.get("before", {}).items():
            values = tuple(by_prompt.get(name, ()))
            self._before[name] = Rate(value, error, len(values), values)
