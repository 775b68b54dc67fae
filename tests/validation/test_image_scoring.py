from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from simpletuner.config.constraints import find_errors
from simpletuner.config.image_metrics import (
    IMAGE_METRICS,
    ImageMetricSpec,
    metric_device_bytes,
)
from simpletuner.config.option_catalog import all_options
from simpletuner.config.schema import ModelOptions, RunConfig, ValidationOptions
from simpletuner.events.event_types import Event, KnowledgeCompared, ScoresComputed
from simpletuner.events.findings import describe_knowledge
from simpletuner.events.formatting import describe_event
from simpletuner.validation import image_scoring
from simpletuner.validation.image_scoring import MetricEvaluator
from simpletuner.validation.model_metrics import mean_of
from simpletuner.validation.prompts import ImageSpec, Prompt
from simpletuner.validation.sampler import generate_latents
from simpletuner.validation.shapes.scene_scoring import Rate, compute_rates
from simpletuner.validation.validation_images import pixels_to_image
from tests.validation.toy_family import INFERENCE, ToyNetwork, decode, embed_text

COUNT = 20  # more than one batch of the sampler


class Bright:
    """How many pictures are bright; keeps what it was shown."""

    uses_references = False

    def __init__(self, name: str, unit: str = "share") -> None:
        self.name = name
        self.unit = unit
        self.image_specs = tuple(
            ImageSpec(Prompt(str(number), f"prompt {number}"), 0, (16, 16), number)
            for number in range(COUNT)
        )
        self.shown: list[Image.Image] = []

    def score(self, drawn: Sequence[Image.Image]) -> dict[str, Rate]:
        self.shown = list(drawn)
        bright = sum(sum(picture.getpixel((0, 0))) > 384 for picture in drawn)
        return {"bright": Rate(bright / len(drawn), 0.25, len(drawn))}


def scorer(events: list[Event], *metrics: Bright) -> MetricEvaluator:
    return MetricEvaluator(INFERENCE, metrics, 3, 1.0, embed_text, lambda: decode, events.append)


def test_every_picture_is_judged_beside_its_prompt() -> None:
    events: list[Event] = []
    metric, network = Bright("bright"), ToyNetwork()
    scorer(events, metric).score(7, network, "ema")
    alone = [
        pixels_to_image(decode(latents))
        for picture in metric.image_specs
        for _, latents in generate_latents(
            INFERENCE, network, [picture], embed_text, steps=3, guidance=1.0
        )
    ]
    assert [one.tobytes() for one in metric.shown] == [one.tobytes() for one in alone]
    (told,) = [event for event in events if isinstance(event, ScoresComputed)]
    bright = sum(sum(one.getpixel((0, 0))) > 384 for one in alone)
    assert 0 < bright < COUNT
    assert told == ScoresComputed(
        7, "bright", "ema", COUNT, {"bright": (bright / COUNT, 0.25, COUNT)}
    )


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


class Scripted(Bright):
    """A score of what the base could do, with given values of the prompts at each call."""

    def __init__(self, *values: Sequence[float]) -> None:
        super().__init__("retention", "similarity")
        self.values = iter(values)

    def score(self, drawn: Sequence[Image.Image]) -> dict[str, Rate]:
        return {"mean": mean_of(next(self.values))}


BEFORE, AFTER = (0.5, 0.7, 0.2, 0.4), (0.4, 0.65, 0.1, 0.3)


def test_what_was_forgotten_has_the_error_of_the_pairs() -> None:
    """By hand: the differences are -0.1, -0.05, -0.1 and -0.1; their deviation is 0.025."""
    events: list[Event] = []
    first = scorer(events, Scripted(BEFORE))
    first.score(0, ToyNetwork(), "base")
    state = json.loads(json.dumps(first.state_dict()))
    assert not [event for event in events if isinstance(event, KnowledgeCompared)]

    def compare(state: dict[str, object], after: Sequence[float] = AFTER) -> KnowledgeCompared:
        events: list[Event] = []
        resumed = scorer(events, Scripted(after))
        resumed.load_state_dict(state)
        resumed.score(6, ToyNetwork(), "trained")
        (found,) = [event for event in events if isinstance(event, KnowledgeCompared)]
        return found

    paired = compare(state)
    assert paired.change_se == pytest.approx(0.025 / 2)
    assert (paired.before, paired.after) == pytest.approx((0.45, 0.3625))
    assert "-0.088 ± 0.013): some of it is forgotten" in describe_knowledge(paired)
    # Neither another number of prompts nor a checkpoint of an earlier version gives pairs.
    assert compare(state, AFTER[:3]).change_se is None
    del state["before_by_prompt"]
    unpaired = compare(state)
    assert unpaired.change_se is None
    assert (unpaired.before_se, unpaired.after_se) == (paired.before_se, paired.after_se)
    assert "0.155): no measurable loss" in describe_knowledge(unpaired)


def test_a_scene_that_is_all_right_counts_once_per_prompt() -> None:
    rates = compute_rates(
        [{"all": [True], "colour": [True, False]}, {"all": [False], "colour": []}]
    )
    assert rates["all"].by_prompt == (1.0, 0.0)
    assert rates["colour"].by_prompt == ()


@pytest.mark.parametrize(
    ("named", "found"),
    [("none", []), ("zorbo", ["zorbo"]), ("zorbo, shapes,zorbo", ["zorbo", "shapes"])],
)
def test_metrics_by_name(named: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_scoring.scene_scoring, "TRAINED_COUNT", 5)
    options = ValidationOptions(evaluation_type=named, evaluation_prompts=3)
    chosen = image_scoring.choose_metrics(options, torch.device("cpu"))
    assert [metric.name for metric in chosen] == found
    assert all(len(metric.image_specs) == 3 for metric in chosen)
    texts = image_scoring.metric_texts(chosen, 1.0)
    assert set(texts) == {
        picture.prompt.text for metric in chosen for picture in metric.image_specs
    }
    assert ("" in image_scoring.metric_texts(chosen, 2.0)) == bool(found)


def test_every_metric_is_declared_once_and_described() -> None:
    assert image_scoring.METRICS.keys() == IMAGE_METRICS.keys()
    options = all_options()
    for name, spec in IMAGE_METRICS.items():
        assert name in options["evaluation_type"].text
        assert f"{spec.default_prompts} for {name}" in options["evaluation_prompts"].text.replace(
            f"for {name}.", f"for {name}"
        )
        assert set(spec.options) <= ValidationOptions.model_fields.keys()


def test_a_new_metric_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets its own options and the device, is allowed, counted by the plan, and has its unit."""
    spec = ImageMetricSpec(
        unit="similarity",
        default_prompts=5,
        needs_device=True,
        device_bytes=1_700_000_000,
        options=("evaluation_prompts", "eval_sigma_count"),
    )
    received: list[image_scoring.MetricInputs] = []

    def build(inputs: image_scoring.MetricInputs) -> Bright:
        received.append(inputs)
        return Bright("agreement", inputs.spec.unit)

    monkeypatch.setitem(IMAGE_METRICS, "agreement", spec)
    monkeypatch.setitem(image_scoring.METRICS, "agreement", build)
    options = ValidationOptions(evaluation_type="agreement", eval_sigma_count=3)
    nano = ModelOptions(model_flavour="nano")
    assert list(find_errors(RunConfig(model=nano, validation=options), {})) == []
    assert metric_device_bytes("agreement, zorbo") == 1_700_000_000
    (metric,) = image_scoring.choose_metrics(options, torch.device("meta"))
    assert received == [
        image_scoring.MetricInputs(
            spec, {"evaluation_prompts": None, "eval_sigma_count": 3}, torch.device("meta")
        )
    ]
    assert received[0].prompt_count == 5
    events: list[Event] = []
    scorer(events, metric).score(1, ToyNetwork(), "trained")
    (scored,) = [event for event in events if isinstance(event, ScoresComputed)]
    assert scored.unit == "similarity"
    value = scored.rates["bright"][0]
    assert f"bright {value:.3f} ± 0.250 similarity" in describe_event(scored)


def test_scoring_leaves_training_alone() -> None:
    network = ToyNetwork().train()
    before = torch.random.get_rng_state()
    scorer([], Bright("bright")).score(0, network, "base")
    assert torch.equal(before, torch.random.get_rng_state())
    assert network.training
    assert not network.grad_seen
