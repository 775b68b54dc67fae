from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.sample_order import SampleOrder
from simpletuner.data.sample_types import BucketedSample, MicroBatchPlan, Sample
from simpletuner.data.sources import LocalFile
from simpletuner.errors import DataError
from tests.quick import assert_quick

SIZES = ((64, 64), (64, 128), (128, 64))


def make(
    name: str, counts: tuple[int, ...], **fields: object
) -> tuple[DatasetConfig, list[BucketedSample]]:
    """A dataset with counts[i] samples in bucket SIZES[i]."""
    placed = []
    for size, count in zip(SIZES, counts):
        for number in range(count):
            sample = Sample(
                f"{name}/{size}{number}", name, LocalFile(Path("x")), *size, ("one", "two", "three")
            )
            placed.append(BucketedSample(sample, size, (0, 0), size))
    return DatasetConfig(name, "image", Path("."), **fields), placed


def order(
    *made: tuple[DatasetConfig, list[BucketedSample]],
    batch: int = 4,
    seed: int = 1,
    **options: object,
) -> SampleOrder:
    placed = sorted((item for _, items in made for item in items), key=lambda item: item.sample.id)
    return SampleOrder(
        tuple(placed), [dataset for dataset, _ in made], seed, batch, DataOptions(**options)
    )


def epoch(found: SampleOrder, number: int) -> list[MicroBatchPlan]:
    start = number * found.batches_per_epoch
    return [found.micro_batch(start + at) for at in range(found.batches_per_epoch)]


def visited(batches: list[MicroBatchPlan]) -> Counter[int]:
    return Counter(visit.sample_index for batch in batches for visit in batch.visits)


counts = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))


@settings(max_examples=40, deadline=None)
@given(
    counts,
    counts,
    st.integers(0, 3),
    st.integers(1, 5),
    st.sampled_from(["auto-weighting", "uniform"]),
)
def test_an_epoch_holds_every_sample_exactly(first, second, repeats, batch, mixing) -> None:
    a, b = make("a", first, repeats=repeats), make("b", second)
    found = order(a, b, batch=batch, data_backend_sampling=mixing)
    for number in (0, 3):
        batches = epoch(found, number)
        seen = visited(batches)
        total = len(a[1]) + len(b[1])
        assert seen == {i: repeats + 1 if i < len(a[1]) else 1 for i in range(total)}
        visits = [
            (visit.sample_index, visit.round_index, visit.repeat_index)
            for one in batches
            for visit in one.visits
        ]
        assert len(set(visits)) == len(visits)
        assert {visit[1] for visit in visits} == {number}
        placed = sorted(a[1] + b[1], key=lambda item: item.sample.id)
        for one in batches:
            assert 1 <= len(one.visits) <= batch
            assert one.epoch == number
            assert (
                len(
                    {
                        (placed[v.sample_index].sample.dataset, placed[v.sample_index].bucket_px)
                        for v in one.visits
                    }
                )
                == 1
            )


def test_order_is_a_pure_function_of_the_number() -> None:
    made = make("a", (9, 5, 3), repeats=2), make("b", (4, 4, 4), probability=0.3)
    straight = [order(*made).micro_batch(number) for number in range(60)]
    shuffled = order(*made)
    for number in np.random.default_rng(0).permutation(60):
        assert shuffled.micro_batch(int(number)) == straight[number]
    assert order(*made, seed=2).micro_batch(0) != straight[0]
    assert [one.index for one in straight] == list(range(60))


def test_epochs_and_passes_group_the_samples_anew() -> None:
    found = order(make("a", (40, 0, 0), repeats=1))
    groups = [
        {
            frozenset(v.sample_index for v in one.visits)
            for one in epoch(found, number)
            if one.visits[0].repeat_index == pass_
        }
        for number in (0, 1)
        for pass_ in (0, 1)
    ]
    assert all(len(group) == 10 for group in groups)
    assert all(not first & second for at, first in enumerate(groups) for second in groups[:at])


def test_a_small_bucket_trains_with_a_smaller_batch_and_says_so() -> None:
    found = order(make("a", (8, 3, 1)), batch=4)
    assert sorted(len(batch.visits) for batch in epoch(found, 0)) == [1, 3, 4, 4]
    assert found.notices == (
        "a: bucket 64x128 has 3 images per round, fewer than a batch of 4; it is trained with a batch of 3",
        "a: bucket 128x64 has 1 image per round, fewer than a batch of 4; it is trained with a batch of 1",
    )
    assert order(make("a", (1, 0, 0), repeats=3)).notices == ()
    assert order(make("a", (6, 0, 0))).notices == (
        "a: 1 of 2 batches per round are smaller than 4",
    )


def test_a_sample_does_not_meet_itself_in_a_batch_of_one_pass() -> None:
    found = order(make("a", (16, 0, 0), repeats=3))
    for batch in epoch(found, 0):
        assert len({visit.sample_index for visit in batch.visits}) == len(batch.visits)


@pytest.mark.parametrize("probability", [0.25, 0.3, 0.9])
def test_probability_is_the_share_shown_per_epoch(probability: float) -> None:
    small = make("b", (20, 7, 0), probability=probability)
    found = order(make("a", (20, 0, 0)), small, batch=2)
    rounds = 14
    share = round(14 * probability) / 14
    seen: Counter[int] = Counter()
    keys = set()
    for number in range(rounds):
        batches = epoch(found, number)
        seen += visited(batches)
        keys |= {(v.sample_index, v.round_index, v.repeat_index) for b in batches for v in b.visits}
    assert all(seen[i] == rounds for i in range(20))
    assert all(seen[i] == round(rounds * share) for i in range(20, 47))
    assert len(keys) == seen.total()
    alike = make("a", (5, 0, 0), probability=0.2), make("b", (5, 0, 0), probability=0.2)
    assert set(visited(epoch(order(*alike), 0)).values()) == {1}


def test_mixing() -> None:
    made = make("a", (200, 0, 0)), make("b", (20, 0, 0))

    def last_of_b(mixing: str) -> float:
        found = order(*made, batch=1, data_backend_sampling=mixing)
        batches = epoch(found, 0)
        return max(at for at, one in enumerate(batches) if one.visits[0].sample_index >= 200) / len(
            batches
        )

    assert last_of_b("auto-weighting") > 0.75
    assert last_of_b("uniform") < 0.4


def test_captions_and_dropout_are_addressed() -> None:
    made = make("a", (300, 0, 0), repeats=9)
    plain = [v for b in epoch(order(made, caption_dropout_probability=0), 0) for v in b.visits]
    shares = Counter(visit.caption_index for visit in plain)
    assert set(shares) == {0, 1, 2}
    assert all(900 < count < 1100 for count in shares.values())
    dropped = [v for b in epoch(order(made, caption_dropout_probability=0.1), 0) for v in b.visits]
    assert 240 < sum(visit.caption_index is None for visit in dropped) < 360
    by_pass = [
        {v.sample_index for v in dropped if v.caption_index is None and v.repeat_index == pass_}
        for pass_ in (0, 1)
    ]
    assert by_pass[0] != by_pass[1]
    kept = {(v.sample_index, v.repeat_index): v.caption_index for v in plain}
    assert all(v.caption_index in (None, kept[v.sample_index, v.repeat_index]) for v in dropped)
    # Another batch size groups the same visits otherwise; what is said to each stays.
    other = [
        v for b in epoch(order(made, batch=7, caption_dropout_probability=0.1), 0) for v in b.visits
    ]
    assert {(v.sample_index, v.repeat_index): v.caption_index for v in other} == {
        (v.sample_index, v.repeat_index): v.caption_index for v in dropped
    }


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="no image to train on"):
        order(make("a", ()))


def test_a_million_samples() -> None:
    sample = Sample("a/x", "a", LocalFile(Path("x")), 64, 64, ("one",))
    placed = [BucketedSample(sample, SIZES[0], (0, 0), SIZES[i % 3]) for i in range(1_000_000)]
    dataset = DatasetConfig("a", "image", Path("."), repeats=1)
    orders = list[SampleOrder]()

    def first() -> None:
        orders.append(SampleOrder(placed, [dataset], 1, 4, DataOptions()))
        orders[-1].micro_batch(0)

    assert_quick(first, 10)

    def thousand() -> None:
        for number in range(1000):
            orders[0].micro_batch(number * 499)

    assert_quick(thousand, 1, tries=1)


def batches_by_dataset(found: SampleOrder, made: list[BucketedSample], number: int) -> Counter[str]:
    return Counter(
        made[batch.visits[0].sample_index].sample.dataset for batch in epoch(found, number)
    )


def test_many_regularisation_images_do_not_outnumber_a_few_that_teach() -> None:
    few, many = make("few", (50, 0, 0)), make("reg", (5000, 0, 0), regularisation_target="base")
    placed = few[1] + many[1]
    for ratio, share in ((1.0, 50), (0.25, 12), (0.0, 5000), (1000.0, 5000)):
        found = order(few, many, batch=1, regularisation_ratio=ratio)
        assert batches_by_dataset(found, placed, 0) == {"few": 50, "reg": share}
        named = [note for note in found.notices if "regularisation_ratio gives" in note]
        assert len(named) == (share < 5000)
    found = order(few, many, batch=1)
    seen = sum((visited(epoch(found, number)) for number in range(100)), Counter[int]())
    assert {count for index, count in seen.items() if index >= 50} == {1}
    assert len(seen) == 5050, "every image has its turn once in 100 epochs"


def test_regularisation_datasets_share_their_part_by_size() -> None:
    few = make("few", (30, 0, 0))
    reg = [
        make(name, (size, 0, 0), regularisation_target="images")
        for name, size in (("r", 100), ("s", 200))
    ]
    placed = sorted(
        (item for _, items in (few, *reg) for item in items), key=lambda item: item.sample.id
    )
    found = order(few, *reg, batch=1)
    assert batches_by_dataset(found, placed, 0) == {"few": 30, "r": 10, "s": 20}
    small = make("reg", (10, 0, 0), regularisation_target="base")
    assert batches_by_dataset(order(few, small, batch=1), few[1] + small[1], 1) == {
        "few": 30,
        "reg": 10,
    }


def test_weights_say_how_often_a_sample_is_used() -> None:
    dataset, placed = make("a", (8,), repeats=1)
    weights = [3.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.125, 0.125]
    weighted = [
        replace(item, sample=replace(item.sample, weight=weight))
        for item, weight in zip(placed, weights)
    ]
    found = order((dataset, weighted), batch=2)
    plain = order((dataset, placed), batch=2)
    rounds = 64
    total: Counter[int] = Counter()
    for number in range(rounds):
        batches = epoch(found, number)
        assert len(batches) == len(epoch(plain, number))
        once = [(visit.sample_index, visit.repeat_index) for one in batches for visit in one.visits]
        assert len(set(once)) == len(once) == 16
        uses = visited(batches)
        assert all(
            2 * int(weight) <= uses[index] <= 2 * -(-weight // 1)
            for index, weight in enumerate(weights)
        )
        total += uses
    assert [total[index] / rounds / 2 for index in range(8)] == pytest.approx(weights, abs=0.06)
    again = order((dataset, weighted), batch=2)
    assert again.micro_batch(77) == found.micro_batch(77)
    equal = [replace(item, sample=replace(item.sample, weight=2.0)) for item in placed]
    assert order((dataset, equal), batch=2).micro_batch(9) == plain.micro_batch(9)
