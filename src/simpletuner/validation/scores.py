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
from simpletuner.events.progress import Stage
from simpletuner.events.types import Emit, Scored
from simpletuner.validation.images import to_image
from simpletuner.validation.inference import Inference
from simpletuner.validation.prompts import Picture, Prompt, captions
from simpletuner.validation.sampler import BATCH_PICTURES, latents_of
from simpletuner.validation.shapes import verdicts
from simpletuner.validation.shapes.read import read
from simpletuner.validation.shapes.verdicts import Rate
from simpletuner.validation.shapes.world import SIDE_PX, Scene
from simpletuner.validation.shapes.zorbo import find


@dataclass(frozen=True)
class Metric:
    """One way to score. name: as evaluation_type says it. pictures: what it wants drawn, always the same.

    judge: the rates of the pictures, given in that order.
    """

    name: str
    pictures: tuple[Picture, ...]
    judge: Callable[[Sequence[Image.Image]], Mapping[str, Rate]]


def _pictures(scenes: Sequence[Scene]) -> tuple[Picture, ...]:
    """A scene's number is its noise's, so the first prompts of many are those of few."""
    return tuple(
        Picture(Prompt(f"{number:03d}", scene.caption), 0, (SIDE_PX, SIDE_PX), verdicts.NOISE_SEED + number)
        for number, scene in enumerate(scenes)
    )


def shapes(count: int | None) -> Metric:
    """Chroma-nano's own world, in captions that no picture of its training has. None: 64 prompts."""
    scenes, new = verdicts.unseen(count or 64)

    def judge(drawn: Sequence[Image.Image]) -> Mapping[str, Rate]:
        asked = zip(scenes, drawn, new, strict=True)
        return verdicts.rates(
            [verdicts.judge(scene, read(picture), fresh) for scene, picture, fresh in asked]
        )

    return Metric("shapes", _pictures(scenes), judge)


def zorbos(count: int | None) -> Metric:
    """The example's concept, in prompts that are not the example's. None: 32 prompts."""
    scenes = verdicts.unseen_zorbos(count or 32)

    def judge(drawn: Sequence[Image.Image]) -> Mapping[str, Rate]:
        asked = zip(scenes, drawn, strict=True)
        return verdicts.rates([verdicts.judge_zorbo(scene, find(picture)) for scene, picture in asked])

    return Metric("zorbo", _pictures(scenes), judge)


METRICS: dict[str, Callable[[int | None], Metric]] = {"shapes": shapes, "zorbo": zorbos}


def chosen(options: ValidationOptions) -> tuple[Metric, ...]:
    """The metrics of evaluation_type, each once."""
    names = dict.fromkeys(name.strip() for name in options.evaluation_type.split(","))
    return tuple(METRICS[name](options.evaluation_prompts) for name in names if name != "none")


def texts(metrics: Sequence[Metric], guidance: float) -> tuple[str, ...]:
    """Every text that must be encoded before the metrics can be drawn."""
    return captions([picture.prompt for metric in metrics for picture in metric.pictures], guidance)


@dataclass
class Scorer:
    """Draws what the metrics ask for, in memory, and tells what they read.

    rows, decoder: as Validator has them; the VAE is held only while it decodes.
    """

    inference: Inference
    metrics: Sequence[Metric]
    steps: int
    guidance: float
    rows: Callable[[str], Tensor]
    decoder: Callable[[], Callable[[Tensor], Tensor]]
    emit: Emit
    _done: dict[str, int] = field(default_factory=dict, init=False)

    def run(self, step: int, transformer: nn.Module, weights: str) -> None:
        """Score the weights that are in the transformer now, once a step. weights: what they are."""
        for metric in self.metrics:
            if self._done.get(metric.name) == step:
                continue
            rates = metric.judge(self._draw(metric, transformer))
            told = {name: (one.rate, one.se, one.of) for name, one in rates.items()}
            self.emit(Scored(step, metric.name, weights, len(metric.pictures), told))
            self._done[metric.name] = step

    def _draw(self, metric: Metric, transformer: nn.Module) -> list[Image.Image]:
        """Latents of all first, which weigh little; then they are decoded in batches."""
        latents, how = [], (self.inference, transformer, metric.pictures, self.rows)
        with Stage(self.emit, f"score {metric.name}", len(metric.pictures), "pictures") as stage:
            for _, one in latents_of(*how, steps=self.steps, guidance=self.guidance):
                latents.append(torch.nan_to_num(one))
                stage.advance()
            decode = self.decoder()
            return [
                to_image(pixels)
                for start in range(0, len(latents), BATCH_PICTURES)
                for pixels in decode(torch.cat(latents[start : start + BATCH_PICTURES])).split(1)
            ]

    def state_dict(self) -> dict[str, object]:
        """JSON-able: the last step of each metric, so that a resumed run repeats none."""
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done = dict(state["done"])
