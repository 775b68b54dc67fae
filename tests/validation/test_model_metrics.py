"""Scores by CLIP and DINOv2 on small random checkpoints, against transformers' own functions."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simpletuner.config.schema import ValidationOptions
from simpletuner.errors import ConfigError
from simpletuner.events.event_types import Event, ScoresComputed, WarningIssued
from simpletuner.models.weights.evaluation_files import (
    locate_evaluation_model,
    measure_evaluation_model,
)
from simpletuner.validation import evaluation_model, model_metrics
from simpletuner.validation.evaluation_model import EvaluationModel
from simpletuner.validation.image_scoring import (
    EvaluationPrompts,
    MetricEvaluator,
    choose_metrics,
)
from simpletuner.validation.prompt_library import GENERAL_PROMPTS, TRIGGER_PROMPTS, library_prompts
from simpletuner.validation.prompts import Prompt, make_image_specs
from tests.models.tiny_evaluation_models import make_clip, make_dinov2
from tests.validation.toy_family import INFERENCE, ToyNetwork, decode, embed_text

CPU = torch.device("cpu")
LONG = " ".join(["an unusually long prompt"] * 12)
TEXTS = ["a red square", "", "zwölf Äpfel", LONG]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dinov2(tmp_path_factory.mktemp("dinov2") / "dinov2")


def make_images(*sizes: tuple[int, int]) -> list[Image.Image]:
    made = []
    for number, (width, height) in enumerate(sizes):
        small = np.random.default_rng(number).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        made.append(Image.fromarray(small).resize((width, height)))
    return made


IMAGES = make_images((64, 64), (100, 40), (33, 90), (32, 32), (31, 57))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def their_pixels(folder: Path) -> Tensor:
    """By transformers' processor that works on PIL images, whatever it is called in this version."""
    import transformers

    kind = json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"]
    names = (f"{kind}Pil", kind)
    processor_class = next(
        getattr(transformers, name) for name in names if name in dir(transformers)
    )
    processor = processor_class.from_pretrained(folder)
    return torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in IMAGES])


def test_pixels_are_those_of_transformers(clip: Path, dinov2: Path) -> None:
    for folder in (clip, dinov2):
        preprocessing = evaluation_model.read_preprocessing(folder)
        mine = torch.stack([preprocessing.pixels(image) for image in IMAGES])
        torch.testing.assert_close(mine, their_pixels(folder), atol=1e-5, rtol=1e-5)


def test_clip_embeddings_are_those_of_transformers(clip: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model = EvaluationModel(clip, CPU)
    network = CLIPModel.from_pretrained(clip)
    tokens = AutoTokenizer.from_pretrained(clip)(
        TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    assert tokens["input_ids"].shape[1] == 77, "the long one is cut at the limit"
    with torch.no_grad():
        out = network(**tokens, pixel_values=their_pixels(clip))
    mine_texts, mine_images = model.embed_texts(TEXTS), model.embed_images(IMAGES)
    torch.testing.assert_close(mine_texts, unit(out.text_embeds), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine_images, unit(out.image_embeds), atol=1e-5, rtol=1e-4)
    cosines = out.logits_per_image / network.logit_scale.exp()
    torch.testing.assert_close(mine_images @ mine_texts.T, cosines, atol=1e-5, rtol=1e-4)
    assert float(cosines.detach().std()) > 1e-2, "random, but not all the same"


def test_dinov2_embeddings_are_those_of_transformers(dinov2: Path) -> None:
    from transformers import Dinov2Model

    with torch.no_grad():
        out = Dinov2Model.from_pretrained(dinov2)(pixel_values=their_pixels(dinov2))
    mine = EvaluationModel(dinov2, CPU).embed_images(IMAGES)
    torch.testing.assert_close(mine, unit(out.last_hidden_state[:, 0]), atol=1e-5, rtol=1e-4)


def test_a_text_in_a_batch_is_the_text_alone(clip: Path) -> None:
    model = EvaluationModel(clip, CPU)
    together = model.embed_texts(TEXTS)
    alone = torch.cat([model.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


class KnownModel:
    """Embeddings that the test sets: images by their red value, texts by their length."""

    def __init__(self, directions: dict[int, list[float]]) -> None:
        self.directions = directions

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        reds = [image.getpixel((0, 0))[0] for image in images]  # type: ignore[index]
        return unit(torch.tensor([self.directions[red] for red in reds]).float())

    def embed_texts(self, texts: list[str]) -> Tensor:
        return unit(torch.tensor([[1.0, float(len(text))] for text in texts]))


def flat(red: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (red, 0, 0))


def test_values_in_closed_form() -> None:
    model: Any = KnownModel({0: [1, 0], 1: [0, 1], 2: [1, 1], 3: [1, 2]})
    specs = make_image_specs([Prompt("a", "x"), Prompt("b", "yy")], [(16, 16)], 2, 1)
    images = [flat(0), flat(1), flat(2), flat(3)]
    references = [flat(0), flat(2)]
    half = math.sqrt(0.5)

    agreement = model_metrics.text_agreement(model, specs, images, references)["mean"]
    first = [half, half]  # the text "x" is at [1, 1]
    second = [3 / math.sqrt(10), 1.0]  # "yy" at [1, 2]
    means = [statistics.fmean(first), statistics.fmean(second)]
    assert agreement.rate == pytest.approx(statistics.fmean(means))
    assert agreement.standard_error == pytest.approx(statistics.stdev(means) / math.sqrt(2))
    assert agreement.total == 2, "two prompts, whatever their samples"

    likeness = model_metrics.likeness_to_references(model, specs, images, references)
    to_first = [1, 0, half, 1 / math.sqrt(5)]
    to_second = [half, half, 1, 3 / math.sqrt(10)]
    both = list(zip(to_first, to_second, strict=True))
    assert likeness["mean"].rate == pytest.approx(statistics.fmean(map(statistics.fmean, both)))
    assert likeness["nearest"].rate == pytest.approx(statistics.fmean(map(max, both)))

    diversity = model_metrics.diversity_of_samples(model, specs, images, references)["mean"]
    assert diversity.rate == pytest.approx(statistics.fmean([1, 1 - 3 / math.sqrt(10)]))


def make_metric_prompts(folder: Path, events: list[Event], samples: int) -> EvaluationPrompts:
    prompts = (Prompt("short", "a cat"), Prompt("long", LONG), Prompt("third", "b"))
    return EvaluationPrompts(prompts, (32, 16), 5, samples, folder, events.append)


def test_several_metrics_share_their_images_and_the_model_is_gone_afterwards(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    alive: list[int] = []

    class Counted(EvaluationModel):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    monkeypatch.setattr(evaluation_model, "EvaluationModel", Counted)
    options = ValidationOptions(evaluation_type="clip,likeness,diversity", evaluation_prompts=2)
    metrics = choose_metrics(options, CPU, make_metric_prompts(clip, events, samples=4))
    assert [len(metric.image_specs) for metric in metrics] == [8, 8, 8]
    network = ToyNetwork()
    evaluator = MetricEvaluator(
        INFERENCE, metrics, 2, 1.0, embed_text, lambda: decode, events.append,
        load_references=lambda: tuple(IMAGES),
    )  # fmt: skip
    for step, weights in ((0, "base"), (3, "trained")):
        network.calls.clear()
        evaluator.score(step, network, weights)
        assert sum(network.calls) == 8 * 2, "eight images of two steps, for all three metrics"
        assert alive == []
    scored = [event for event in events if isinstance(event, ScoresComputed)]
    assert [(event.metric, event.step, event.weights) for event in scored] == [
        (metric, step, weights)
        for step, weights in ((0, "base"), (3, "trained"))
        for metric in ("clip", "likeness", "diversity")
    ]
    assert [event.unit for event in scored[:3]] == ["similarity", "similarity", "distance"]
    assert {event.prompts for event in scored} == {2}
    assert scored[0].rates == scored[3].rates, "the same weights and seeds"
    warnings = [event.message for event in events if isinstance(event, WarningIssued)]
    assert warnings == [
        "clip reads 77 tokens, and this prompt is longer, so the end is not scored: long"
    ]


def test_what_cannot_score_is_refused_in_one_line(clip: Path, dinov2: Path, tmp_path: Path) -> None:
    def refusal(folder: Path, metrics: str = "clip") -> str:
        with pytest.raises(ConfigError) as caught:
            locate_evaluation_model(str(folder), metrics, lambda event: None)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert locate_evaluation_model(str(clip), "clip", lambda event: None) == clip
    assert locate_evaluation_model(str(dinov2), "likeness", lambda event: None) == dinov2
    assert "is DINOv2, which reads no text, so it cannot score clip" in refusal(dinov2)
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    assert "is a model of type 'bert'; scores are computed by CLIP or DINOv2" in refusal(other)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json with a model_type" in refusal(empty)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "clip", "auto_map": {"x": "y.py"}}')
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    assert "has no model.safetensors" in refusal(pickled)
    assert "neither a folder nor a hub repository" in refusal(tmp_path / "nowhere")


def test_the_size_for_the_plan(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = measure_evaluation_model(str(clip))
    assert size.weights == (clip / "model.safetensors").stat().st_size
    assert size.download == 0
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *arguments: None)
    absent = measure_evaluation_model(None)
    assert absent.download == absent.weights == 1_710_540_580
    assert not absent.is_assumed
    assert measure_evaluation_model("who/what").is_assumed


def test_the_built_in_prompts() -> None:
    assert len(GENERAL_PROMPTS) == 40
    assert len(set(GENERAL_PROMPTS.values())) == 40
    kinds = {name.split("-")[0] for name in GENERAL_PROMPTS}
    assert kinds == {"subject", "style", "text", "count", "position", "attribute"}
    assert all('"' in text for name, text in GENERAL_PROMPTS.items() if name.startswith("text-"))
    assert len(library_prompts(None)) == 40
    concept = library_prompts("zwx fox")
    assert len(concept) == 50
    assert [prompt.id for prompt in concept[:10]] == list(TRIGGER_PROMPTS)
    assert all("zwx fox" in prompt.text for prompt in concept[:10])
    assert not any("{" in prompt.text for prompt in concept)
