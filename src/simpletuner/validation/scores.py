"""What a program reads from a run's pictures of prompts that nobody trained on: rates of what is right.

A metric brings its own prompts and its own eyes. It is no judge of beauty and needs no second model: either
a picture has what its prompt says, or it has not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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


class Metric(ABC):
    """One way to score. name: as evaluation_type says it. pictures: what it wants drawn, always the same."""

    name: str
    pictures: tuple[Picture, ...]

    @abstractmethod
    def judge(self, drawn: Sequence[Image.Image]) -> Mapping[str, Rate]:
        """The rates of the pictures, given in the order of `pictures`."""


def _pictures(scenes: Sequence[Scene]) -> tuple[Picture, ...]:
    """A scene's number is its noise's, so the first prompts of many are those of few."""
    return tuple(
        Picture(Prompt(f"{number:03d}", scene.caption), 0, (SIDE_PX, SIDE_PX), verdicts.NOISE_SEED + number)
        for number, scene in enumerate(scenes)
    )


class Shapes(Metric):
    """Chroma-nano's own world, in captions that no picture of its training has. None: 64 prompts."""

    name = "shapes"

    def __init__(self, count: int | None) -> None:
        self.scenes, self.new = verdicts.unseen(count or 64)
        self.pictures = _pictures(self.scenes)

    def judge(self, drawn: Sequence[Image.Image]) -> dict[str, Rate]:
        asked = zip(self.scenes, drawn, self.new, strict=True)
        return verdicts.rates([verdicts.judge(scene, read(picture), new) for scene, picture, new in asked])


class Zorbos(Metric):
    """The example's concept, in prompts that are not the example's. None: 32 prompts."""

    name = "zorbo"

    def __init__(self, count: int | None) -> None:
        self.scenes = verdicts.unseen_zorbos(count or 32)
        self.pictures = _pictures(self.scenes)

    def judge(self, drawn: Sequence[Image.Image]) -> dict[str, Rate]:
        asked = zip(self.scenes, drawn, strict=True)
        return verdicts.rates([verdicts.judge_zorbo(scene, find(picture)) for scene, picture in asked])


METRICS: dict[str, Callable[[int | None], Metric]] = {"shapes": Shapes, "zorbo": Zorbos}


def chosen(options: ValidationOptions) -> tuple[Metric, ...]:
    """The metrics of evaluation_type, each once."""
    names = dict.fromkeys(name.strip() for name in options.evaluation_type.split(","))
    return tuple(METRICS[name](options.evaluation_prompts) for name in names if name != "none")


def texts(metrics: Sequence[Metric], guidance: float) -> tuple[str, ...]:
    """Every text that must be encoded before the metrics can be drawn."""
    return captions([picture.prompt for metric in metrics for picture in metric.pictures], guidance)


class Scorer:
    """Draws what the metrics ask for, in memory, and tells what they read.

    rows, decoder: as Validator has them; the VAE is held only while it decodes.
    """

    def __init__(
        self, inference: Inference, metrics: Sequence[Metric], steps: int, guidance: float,
        rows: Callable[[str], Tensor], decoder: Callable[[], Callable[[Tensor], Tensor]], emit: Emit,
    ) -> None:  # fmt: skip
        self.inference, self.metrics, self.emit = inference, tuple(metrics), emit
        self.steps, self.guidance = steps, guidance
        self.rows, self.decoder = rows, decoder
        self._done: dict[str, int] = {}

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
        latents, asked, guidance = [], metric.pictures, self.guidance
        with Stage(self.emit, f"score {metric.name}", len(metric.pictures), "pictures") as stage:
            for _, one in latents_of(
                self.inference, transformer, asked, self.rows, steps=self.steps, guidance=guidance
            ):
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
