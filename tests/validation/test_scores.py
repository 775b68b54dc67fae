from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from simpletuner.config.schema import ValidationOptions
from simpletuner.events.types import Event, Scored
from simpletuner.validation import scores
from simpletuner.validation.images import to_image
from simpletuner.validation.prompts import Picture, Prompt
from simpletuner.validation.sampler import latents_of
from simpletuner.validation.scores import Scorer
from simpletuner.validation.shapes.verdicts import Rate
from tests.validation.toy import INFERENCE, Network, decode, rows_of

COUNT = 20  # more than one batch of the sampler


class Bright:
    """How many pictures are bright; keeps what it was shown."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pictures = tuple(
            Picture(Prompt(str(number), f"prompt {number}"), 0, (16, 16), number) for number in range(COUNT)
        )
        self.shown: list[Image.Image] = []

    def judge(self, drawn: Sequence[Image.Image]) -> dict[str, Rate]:
        self.shown = list(drawn)
        bright = sum(sum(picture.getpixel((0, 0))) > 384 for picture in drawn)
        return {"bright": Rate(bright / len(drawn), 0.25, len(drawn))}


def scorer(events: list[Event], *metrics: Bright) -> Scorer:
    return Scorer(INFERENCE, metrics, 3, 1.0, rows_of, lambda: decode, events.append)


def test_every_picture_is_judged_beside_its_prompt() -> None:
    events: list[Event] = []
    metric, network = Bright("bright"), Network()
    scorer(events, metric).run(7, network, "ema")
    alone = [
        to_image(decode(latents))
        for picture in metric.pictures
        for _, latents in latents_of(INFERENCE, network, [picture], rows_of, steps=3, guidance=1.0)
    ]
    assert [one.tobytes() for one in metric.shown] == [one.tobytes() for one in alone]
    (told,) = [event for event in events if isinstance(event, Scored)]
    bright = sum(sum(one.getpixel((0, 0))) > 384 for one in alone)
    assert 0 < bright < COUNT
    assert told == Scored(7, "bright", "ema", COUNT, {"bright": (bright / COUNT, 0.25, COUNT)})


def test_broken_weights_are_no_crash() -> None:
    events: list[Event] = []
    scorer(events, Bright("bright")).run(7, Network(float("nan")), "trained")
    assert any(isinstance(event, Scored) for event in events)


def test_no_step_is_scored_twice_across_a_restart() -> None:
    events: list[Event] = []
    first = scorer(events, Bright("one"))
    first.run(0, Network(), "base")
    first.run(4, Network(), "trained")
    first.run(4, Network(), "trained")
    resumed = scorer(events, Bright("one"), Bright("two"))
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    resumed.run(4, Network(), "trained")
    resumed.run(6, Network(), "trained")
    told = [(event.metric, event.step) for event in events if isinstance(event, Scored)]
    assert told == [("one", 0), ("one", 4), ("two", 4), ("one", 6), ("two", 6)]


@pytest.mark.parametrize(
    ("named", "found"),
    [("none", []), ("zorbo", ["zorbo"]), ("zorbo, shapes,zorbo", ["zorbo", "shapes"])],
)
def test_metrics_by_name(named: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores.verdicts, "TRAINED_COUNT", 5)
    chosen = scores.chosen(ValidationOptions(evaluation_type=named, evaluation_prompts=3))
    assert [metric.name for metric in chosen] == found
    assert all(len(metric.pictures) == 3 for metric in chosen)
    texts = scores.texts(chosen, 1.0)
    assert set(texts) == {picture.prompt.text for metric in chosen for picture in metric.pictures}
    assert ("" in scores.texts(chosen, 2.0)) == bool(found)


def test_scoring_leaves_training_alone() -> None:
    network = Network().train()
    before = torch.random.get_rng_state()
    scorer([], Bright("bright")).run(0, network, "base")
    assert torch.equal(before, torch.random.get_rng_state())
    assert network.training
    assert not network.grad_seen
