from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from simpletuner.config.schema import ValidationOptions
from simpletuner.events.event_types import Event, ScoresComputed
from simpletuner.validation import image_scoring
from simpletuner.validation.image_scoring import Scorer
from simpletuner.validation.prompts import ImageSpec, Prompt
from simpletuner.validation.sampler import generate_latents
from simpletuner.validation.shapes.scene_scoring import Rate
from simpletuner.validation.validation_images import pixels_to_image
from tests.validation.toy_family import INFERENCE, ToyNetwork, decode, embed_text

COUNT = 20  # more than one batch of the sampler


class Bright:
    """How many pictures are bright; keeps what it was shown."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.image_specs = tuple(
            ImageSpec(Prompt(str(number), f"prompt {number}"), 0, (16, 16), number) for number in range(COUNT)
        )
        self.shown: list[Image.Image] = []

    def score(self, drawn: Sequence[Image.Image]) -> dict[str, Rate]:
        self.shown = list(drawn)
        bright = sum(sum(picture.getpixel((0, 0))) > 384 for picture in drawn)
        return {"bright": Rate(bright / len(drawn), 0.25, len(drawn))}


def scorer(events: list[Event], *metrics: Bright) -> Scorer:
    return Scorer(INFERENCE, metrics, 3, 1.0, embed_text, lambda: decode, events.append)


def test_every_picture_is_judged_beside_its_prompt() -> None:
    events: list[Event] = []
    metric, network = Bright("bright"), ToyNetwork()
    scorer(events, metric).score(7, network, "ema")
    alone = [
        pixels_to_image(decode(latents))
        for picture in metric.image_specs
        for _, latents in generate_latents(INFERENCE, network, [picture], embed_text, steps=3, guidance=1.0)
    ]
    assert [one.tobytes() for one in metric.shown] == [one.tobytes() for one in alone]
    (told,) = [event for event in events if isinstance(event, ScoresComputed)]
    bright = sum(sum(one.getpixel((0, 0))) > 384 for one in alone)
    assert 0 < bright < COUNT
    assert told == ScoresComputed(7, "bright", "ema", COUNT, {"bright": (bright / COUNT, 0.25, COUNT)})


def test_broken_weights_are_no_crash() -> None:
    events: list[Event] = []
    scorer(events, Bright("bright")).score(7, ToyNetwork(float("nan")), "trained")
    assert any(isinstance(event, ScoresComputed) for event in events)


def test_no_step_is_scored_twice_across_a_restart() -> None:
    events: list[Event] = []
    first = scorer(events, Bright("one"))
    first.score(0, ToyNetwork(), "base")
    first.score(4, ToyNetwork(), "trained")
    first.score(4, ToyNetwork(), "trained")
    resumed = scorer(events, Bright("one"), Bright("two"))
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    resumed.score(4, ToyNetwork(), "trained")
    resumed.score(6, ToyNetwork(), "trained")
    told = [(event.metric, event.step) for event in events if isinstance(event, ScoresComputed)]
    assert told == [("one", 0), ("one", 4), ("two", 4), ("one", 6), ("two", 6)]


@pytest.mark.parametrize(
    ("named", "found"),
    [("none", []), ("zorbo", ["zorbo"]), ("zorbo, shapes,zorbo", ["zorbo", "shapes"])],
)
def test_metrics_by_name(named: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_scoring.scene_scoring, "TRAINED_COUNT", 5)
    chosen = image_scoring.choose_metrics(ValidationOptions(evaluation_type=named, evaluation_prompts=3))
    assert [metric.name for metric in chosen] == found
    assert all(len(metric.image_specs) == 3 for metric in chosen)
    texts = image_scoring.metric_texts(chosen, 1.0)
    assert set(texts) == {picture.prompt.text for metric in chosen for picture in metric.image_specs}
    assert ("" in image_scoring.metric_texts(chosen, 2.0)) == bool(found)


def test_scoring_leaves_training_alone() -> None:
    network = ToyNetwork().train()
    before = torch.random.get_rng_state()
    scorer([], Bright("bright")).score(0, network, "base")
    assert torch.equal(before, torch.random.get_rng_state())
    assert network.training
    assert not network.grad_seen
