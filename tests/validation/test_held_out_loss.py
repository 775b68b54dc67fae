from __future__ import annotations

import json
import math
import random
from functools import partial
from pathlib import Path

import pytest
import torch

from simpletuner.data.sample_types import BucketedSample, Sample
from simpletuner.data.sources import LocalFile
from simpletuner.events.event_types import Event, LossEvaluated
from simpletuner.validation.held_out_loss import (
    HeldOutEvaluator,
    HeldOutSet,
    choose_samples,
    fixed_batches,
    fixed_noise,
    paired_change,
    sigma_midpoints,
)
from tests.validation.toy_family import (
    INFERENCE,
    ToyNetwork,
    embed_text,
    make_batch,
    mean_embedding,
)

IDS = [f"pets/{number}.png" for number in range(7)]
OTHERS = ["pets/x.png", "pets/y.png", "pets/z.png"]


def split(name: str, ids: list[str], batch_size: int) -> HeldOutSet:
    batches = [
        make_batch(ids[start : start + batch_size]) for start in range(0, len(ids), batch_size)
    ]
    return HeldOutSet(
        name, "pets", len(ids), [partial(list.__getitem__, batches, i) for i in range(len(batches))]
    )


def evaluated(held_out: HeldOutEvaluator, network: ToyNetwork, step: int) -> list[LossEvaluated]:
    events: list[Event] = []
    held_out.evaluate(network, step, events.append)
    return [event for event in events if isinstance(event, LossEvaluated)]


def by_hand(sample: str, sigma: float, index: int, gain: float) -> float:
    latents = make_batch([sample]).latents[0]
    noise = fixed_noise(42, sample, index, latents.shape)
    predicted = (
        gain * ((1 - sigma) * latents + sigma * noise)
        + mean_embedding(embed_text(sample))[:, None, None]
    )
    return float((predicted - (noise - latents)).square().mean())


def test_the_loss_is_what_it_says() -> None:
    (event,) = evaluated(
        HeldOutEvaluator(INFERENCE, [split("eval", IDS, 3)], 4, 42), ToyNetwork(0.5), 0
    )
    table = [
        [by_hand(one, sigma, k, 0.5) for one in IDS]
        for k, sigma in enumerate((0.125, 0.375, 0.625, 0.875))
    ]
    assert event.loss == pytest.approx(sum(map(sum, table)) / 28, rel=1e-5)
    assert [sigma for sigma, _ in event.by_sigma] == [0.125, 0.375, 0.625, 0.875]
    assert [loss for _, loss in event.by_sigma] == pytest.approx(
        [sum(row) / 7 for row in table], rel=1e-5
    )
    assert (event.change, event.change_se, event.best) == (0.0, 0.0, True)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_size_and_order_do_not_matter(batch_size: int) -> None:
    expected = evaluated(
        HeldOutEvaluator(INFERENCE, [split("eval", IDS, 3)], 4, 42), ToyNetwork(), 0
    )[0]
    shuffled = random.Random(batch_size).sample(IDS, len(IDS))
    found = evaluated(
        HeldOutEvaluator(INFERENCE, [split("eval", shuffled, batch_size)], 4, 42), ToyNetwork(), 0
    )[0]
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert dict(found.by_sigma) == pytest.approx(dict(expected.by_sigma), rel=1e-6)
    other = evaluated(HeldOutEvaluator(INFERENCE, [split("eval", IDS, 3)], 4, 43), ToyNetwork(), 0)[
        0
    ]
    assert other.loss != expected.loss


def test_paired_change_in_closed_form() -> None:
    baseline = {"a": 1.0, "b": 20.0, "c": 300.0, "gone": 5.0}
    losses = {"a": 0.9, "b": 19.8, "c": 299.7, "new": 1e6}
    change, error = paired_change(losses, baseline)
    assert change == pytest.approx(-0.2)
    assert error == pytest.approx(0.1 / math.sqrt(3))
    assert paired_change({"a": 2.0}, {"a": 1.0}) == (1.0, 0.0)
    assert paired_change({"a": 2.0}, {}) == (0.0, 0.0)


def test_change_against_step_0_survives_a_restart() -> None:
    sets = [split("eval", IDS, 3), split("train", OTHERS, 2)]
    held_out = HeldOutEvaluator(INFERENCE, sets, 4, 42)
    base, train = evaluated(held_out, ToyNetwork(0.5), 0)
    assert (train.split, train.best) == ("train", False)
    better, trained = evaluated(held_out, ToyNetwork(0.1), 100)
    assert trained.change == pytest.approx(trained.loss - train.loss, rel=1e-4)
    assert trained.change_se > 0
    differences = [
        sum(
            by_hand(one, sigma, k, 0.1) - by_hand(one, sigma, k, 0.5)
            for k, sigma in enumerate(sigma_midpoints(4))
        )
        / 4
        for one in IDS
    ]
    mean = sum(differences) / 7
    spread = math.sqrt(sum((one - mean) ** 2 for one in differences) / 6)
    assert better.change == pytest.approx(mean, rel=1e-4)
    assert better.change_se == pytest.approx(spread / math.sqrt(7), rel=1e-4)
    assert better.change == pytest.approx(better.loss - base.loss, rel=1e-4)
    assert better.best

    resumed = HeldOutEvaluator(INFERENCE, sets, 4, 42)
    resumed.load_state_dict(json.loads(json.dumps(held_out.state_dict())))
    assert resumed.best_step == 100
    worse, _ = evaluated(resumed, ToyNetwork(0.4), 200)
    assert not worse.best
    assert evaluated(held_out, ToyNetwork(0.4), 200)[0] == worse
    assert (
        json.loads(json.dumps(HeldOutEvaluator(INFERENCE, sets, 4, 42).state_dict()))["best_loss"]
        is None
    )


def test_without_an_eval_set_nothing_is_best() -> None:
    held_out = HeldOutEvaluator(INFERENCE, [split("train", IDS, 3)], 4, 42)
    assert not evaluated(held_out, ToyNetwork(), 0)[0].best
    assert held_out.best_step is None


def test_measuring_leaves_training_alone() -> None:
    network = ToyNetwork()
    network.train()
    before = torch.random.get_rng_state()
    evaluated(HeldOutEvaluator(INFERENCE, [split("eval", IDS, 3)], 2, 42), network, 0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert network.training
    assert network.gain.grad is None
    assert not network.grad_seen


def placed(name: str, width: int = 64) -> BucketedSample:
    sample = Sample(f"pets/{name}", "pets", LocalFile(Path(name)), width, 64, ("first", "second"))
    return BucketedSample(sample, (width, 64), (0, 0), (width, 64))


def test_the_frozen_part_stays_when_data_are_added() -> None:
    few = [placed(f"{number}.png") for number in range(100)]
    many = [placed(f"{number}.png") for number in range(110)]
    first = {few[index].sample.id for index in choose_samples(few, 20, 42)}
    second = {many[index].sample.id for index in choose_samples(many, 20, 42)}
    assert len(first) == 20
    assert len(first & second) >= 15
    assert {few[index].sample.id for index in choose_samples(few[::-1], 200, 42)} == {
        one.sample.id for one in few
    }


def test_batches_have_one_bucket_and_the_first_caption() -> None:
    samples = [placed(f"{number}.png", 64 * (1 + number % 2)) for number in range(7)]
    batches = fixed_batches(samples, range(1, 7), 2)
    assert [[visit.sample_index for visit in batch.visits] for batch in batches] == [
        [1, 3],
        [5],
        [2, 4],
        [6],
    ]
    assert {visit.caption_index for batch in batches for visit in batch.visits} == {0}
    assert len({batch.index for batch in batches}) == 4
