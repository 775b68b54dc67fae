"""Wrong captions are found by what a base predicts with the captions of other images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.events.event_types import CaptionFitMeasured, Event
from simpletuner.events.findings import describe_finding
from simpletuner.events.report_findings import render_findings
from simpletuner.events.run_history import RunHistory
from simpletuner.peers import ALONE, Item, Peers
from simpletuner.validation.caption_fit import find_unfit, measure_margins
from simpletuner.validation.held_out_loss import HeldOutEvaluator, HeldOutSet, fixed_noise
from tests.validation.toy_family import INFERENCE, ToyNetwork, mean_embedding

NAMES = [f"{number}.png" for number in range(12)]
# A caption is a corner of a cube in four dimensions; the wrong ones are opposite to the right ones.
CAPTIONS = {name: f"{number:04b}" for number, name in enumerate(NAMES)}
WRONG = {"4.png": CAPTIONS["11.png"], "7.png": CAPTIONS["8.png"]}


def embed(caption: str) -> dict[str, torch.Tensor]:
    return {"t5": torch.tensor([[1.0 if bit == "1" else -1.0 for bit in caption]])}


def word(caption: str) -> torch.Tensor:
    return mean_embedding(embed(caption))[:, None, None]


def make_batch(names: list[str], captions: dict[str, str]) -> Batch:
    """Images that a network without gain predicts exactly with their own caption, but for noise."""
    latents = torch.stack([(-word(CAPTIONS[name])).expand(4, 2, 2) for name in names])
    text = TextBatch.stack([embed(captions[name]) for name in names])
    return Batch(latents, text, tuple(names), tuple(names))


def training_set(captions: dict[str, str], batch_size: int) -> HeldOutSet:
    parts = [NAMES[start : start + batch_size] for start in range(0, len(NAMES), batch_size)]
    return HeldOutSet(
        "train", "pets", len(NAMES), [partial(make_batch, part, captions) for part in parts]
    )


def measure(captions: dict[str, str], batch_size: int, step: int = 0) -> list[CaptionFitMeasured]:
    events: list[Event] = []
    evaluator = HeldOutEvaluator(INFERENCE, [training_set(captions, batch_size)], 4, 42)
    evaluator.evaluate(ToyNetwork(0.0), step, events.append)
    return [event for event in events if isinstance(event, CaptionFitMeasured)]


@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_planted_captions_are_found(batch_size: int) -> None:
    (event,) = measure({**CAPTIONS, **WRONG}, batch_size)
    assert set(event.unfit) == set(WRONG)
    assert event.margins.keys() == set(NAMES)
    (sound,) = measure(CAPTIONS, batch_size)
    assert sound.unfit == ()
    assert min(sound.margins.values()) > 0


def test_a_margin_in_closed_form() -> None:
    """Of the first image, whose batch is compared with the next two, at sigmas 0.375 and 0.625."""
    (event,) = measure(CAPTIONS, 4)
    losses = {
        caption: sum(
            float((word(caption) - noise - word(CAPTIONS["0.png"])).square().mean())
            for noise in (
                fixed_noise(42, "0.png", index, torch.Size((4, 2, 2))) for index in (1, 2)
            )
        )
        / 2
        for caption in (CAPTIONS[name] for name in ("0.png", "4.png", "8.png"))
    }
    own, first, second = losses.values()
    assert event.margins["0.png"] == pytest.approx((first + second) / 2 - own, rel=1e-5)


def test_equal_captions_are_not_compared() -> None:
    same = dict.fromkeys(NAMES, "0000")
    (event,) = measure(same, 4)
    assert (event.margins, event.unfit) == ({}, ())
    (event,) = measure({**same, "0.png": "1111"}, 12)
    assert set(event.margins) == {"0.png", "10.png", "11.png"}  # those that meet the other caption


class Share(Peers):
    """One of two processes, of which the second repeats a batch where the numbers are odd."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def share_passes(self, items: Sequence[Item]) -> list[tuple[int | None, Item]]:
        mine: list[tuple[int | None, Item]] = list(enumerate(items))[self.rank :: 2]
        return mine if len(mine) == (len(items) + 1) // 2 else [*mine, (None, items[0])]


def test_processes_share_out_the_images() -> None:
    batches = training_set(CAPTIONS, 4).batches
    own = {name: [1.0] * 4 for name in NAMES}

    def losses_of(batch: Batch, index: int) -> torch.Tensor:
        words = batch.text.tensors["t5"].double().sum(dim=(1, 2))
        return words + index * batch.latents.double().sum(dim=(1, 2, 3))

    def margins(peers: Peers) -> dict[str, float]:
        return measure_margins(batches, own, [1, 2], losses_of, peers)

    first, second = margins(Share(0)), margins(Share(1))
    assert not first.keys() & second.keys()
    assert {**first, **second} == margins(ALONE)
    assert len(margins(ALONE)) == 12


def test_only_before_the_first_step() -> None:
    assert measure(CAPTIONS, 4, step=1) == []


def test_no_caption_is_doubted_where_the_base_understands_none() -> None:
    clear = {f"{number}.png": 1.0 + number / 100 for number in range(12)}
    assert find_unfit({**clear, "odd.png": 0.1, "worse.png": -0.2}) == ["worse.png", "odd.png"]
    assert find_unfit({**clear, "usual.png": 0.4}) == []
    confused = {
        name: value if index % 2 else -value for index, (name, value) in enumerate(clear.items())
    }
    assert find_unfit(confused) == []
    assert find_unfit({"a.png": 1.0, "b.png": -1.0}) == []


def test_the_finding_names_them(tmp_path: Path) -> None:
    event = CaptionFitMeasured("pets", dict.fromkeys(NAMES, 1.0), ("3.png", "7.png"))
    text = describe_finding(event)
    assert "2 of 12 training images fit hardly better" in text
    assert text.endswith("3.png, 7.png")
    assert "no doubtful one" in describe_finding(dataclasses.replace(event, unfit=()))
    history = RunHistory(caption_fit=event)
    assert "2 of 12 training images" in render_findings(history)
