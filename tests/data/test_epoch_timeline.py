"""Datasets that start and end within a run, and batches of a dataset's own size."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import ActivePeriod, DatasetConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.data.sample_order import SampleOrder
from simpletuner.data.sample_types import BucketedSample, MicroBatchPlan, Sample
from simpletuner.data.sources import LocalFile
from simpletuner.errors import DataError

SIZE = (64, 64)
ALWAYS = ActivePeriod()
Made = tuple[DatasetConfig, list[BucketedSample]]


def make(name: str, count: int, active: ActivePeriod = ALWAYS, **fields: object) -> Made:
    framing = ResizeCropConfig(train_batch_size=fields.pop("train_batch_size", None))
    config = DatasetConfig(name, "image", Path("."), framing, active=active, **fields)
    samples = [
        Sample(f"{name}/{number:03}", name, LocalFile(Path("x")), *SIZE, ("c",))
        for number in range(count)
    ]
    return config, [BucketedSample(sample, SIZE, (0, 0), SIZE) for sample in samples]


def order(*made: Made, per_step: int = 1, batch: int = 1, **options: object) -> SampleOrder:
    placed = tuple(item for _, items in made for item in items)
    datasets = [config for config, _ in made]
    return SampleOrder(placed, datasets, 1, batch, DataOptions(**options), per_step)


def batches(found: SampleOrder, start: int, end: int) -> list[MicroBatchPlan]:
    return [found.micro_batch(number) for number in range(start, end)]


def names(made: tuple[Made, ...], plans: list[MicroBatchPlan]) -> Counter[str]:
    placed = [item for _, items in made for item in items]
    return Counter(placed[visit.sample_index].sample.dataset for p in plans for visit in p.visits)


def test_a_run_changes_from_one_set_to_the_other_at_a_step() -> None:
    """Steps of two micro-batches: low has steps 1 to 7, high has all after them."""
    made = make("low", 4, ActivePeriod(end_step=7)), make("high", 5, ActivePeriod(start_step=7))
    found = order(*made, per_step=2)
    assert names(made, batches(found, 0, 14)) == {"low": 14}
    assert names(made, batches(found, 14, 24)) == {"high": 10}
    # 14 micro-batches are 3 epochs of 4, and an epoch of 2 that ends early.
    epochs = [plan.epoch for plan in batches(found, 0, 24)]
    assert epochs == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2 + [4] * 5 + [5] * 5
    timeline = found.timeline
    assert [timeline.first_number(epoch) for epoch in range(6)] == [0, 4, 8, 12, 14, 19]
    assert timeline.progress(13) == 3.5
    assert timeline.progress(14) == 4.0


def test_epochs_of_a_set_are_counted_from_one_and_include_the_last() -> None:
    made = make("all", 3), make("some", 2, ActivePeriod(start_epoch=2, end_epoch=3))
    found = order(*made)
    per_epoch = [
        names(
            made, batches(found, found.timeline.first_number(e), found.timeline.first_number(e + 1))
        )
        for e in range(5)
    ]
    both = {"all": 3, "some": 2}
    assert per_epoch == [{"all": 3}, both, both, {"all": 3}, {"all": 3}]


def test_a_set_goes_on_where_an_epoch_that_ended_early_left_it() -> None:
    """Over any whole number of its rounds a set uses every sample once, also across changes."""
    made = make("a", 7), make("b", 4, ActivePeriod(start_step=5, end_step=17))
    found = order(*made)
    visits = [
        (visit.sample_index, visit.round_index) for p in batches(found, 0, 60) for visit in p.visits
    ]
    assert len(set(visits)) == 60, "no visit is repeated, so none of its noise is"
    for turn in range(5):
        assert {index for index, of in visits if of == turn and index < 7} == set(range(7))
    assert names(made, batches(found, 5, 17))["b"] >= 4
    assert names(made, [*batches(found, 0, 5), *batches(found, 17, 60)])["b"] == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 6),
            st.integers(1, 4),
            st.integers(0, 3),
            st.integers(0, 9),
            st.integers(0, 12),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 3),
    st.sampled_from(["auto-weighting", "uniform"]),
)
def test_the_order_is_a_pure_function_and_the_epochs_are_whole(sets, per_step, mixing) -> None:
    made = (
        make("z", 3),
        *(
            make(
                str(number),
                count,
                ActivePeriod(
                    start_epoch,
                    start_epoch + epochs - 1 if epochs else None,
                    start_step,
                    start_step + steps if steps else None,
                ),
            )
            for number, (count, start_epoch, epochs, start_step, steps) in enumerate(sets)
        ),
    )
    total = 80
    straight = batches(order(*made, per_step=per_step, data_backend_sampling=mixing), 0, total)
    again = order(*made, per_step=per_step, data_backend_sampling=mixing)
    for number in np.random.default_rng(0).permutation(total):
        assert again.micro_batch(int(number)) == straight[number]
    epochs = [plan.epoch for plan in straight]
    assert epochs[0] == 0
    assert all(after - before in (0, 1) for before, after in pairwise(epochs))
    changes = {number for number in range(1, total) if epochs[number] != epochs[number - 1]}
    timeline = again.timeline
    assert changes == {
        number
        for epoch in range(1, epochs[-1] + 1)
        if (number := timeline.first_number(epoch)) < total
    }
    visits = [(v.sample_index, v.round_index, v.repeat_index) for p in straight for v in p.visits]
    assert len(set(visits)) == len(visits)
    placed = [item for _, items in made for item in items]
    periods = {config.id: config.active for config, _ in made}
    for plan in straight:
        name = placed[plan.visits[0].sample_index].sample.dataset
        assert periods[name].holds(plan.index // per_step, plan.epoch)


def test_a_run_ends_before_its_sets_do() -> None:
    made = make("a", 4, ActivePeriod(end_step=10)), make("b", 2, ActivePeriod(end_epoch=1))
    found = order(*made)
    assert (found.timeline.end_number, found.timeline.first_number(9)) == (10, None)
    with pytest.raises(DataError, match="active in the first step"):
        order(make("a", 4, ActivePeriod(start_step=1)))


def test_passes_before_a_micro_batch_are_those_of_the_order() -> None:
    made = make("a", 7), make("b", 4, ActivePeriod(start_step=5, end_step=17), repeats=1)
    found = order(*made)
    for number in (1, 5, 6, 16, 17, 40):
        used = names(made, batches(found, 0, number))
        assert found.passes_before(number) == {"a": used["a"] / 7, "b": used["b"] / 4}


def test_a_set_has_batches_of_its_own_size() -> None:
    made = make("low", 12, train_batch_size=6), make("high", 4)
    found = order(*made, batch=2)
    plans = batches(found, 0, found.batches_per_epoch)
    placed = [item for _, items in made for item in items]
    sizes = Counter((placed[p.visits[0].sample_index].sample.dataset, len(p.visits)) for p in plans)
    assert sizes == {("low", 6): 2, ("high", 2): 2}


def crops(name: str, count: int, sizes: list[tuple[int, int]], **fields: object) -> Made:
    """A set whose samples have one crop per size; those of every second begin with another."""
    config, placed = make(name, count, **fields)
    found = []
    for number, item in enumerate(placed):
        turned = sizes[number % 2 :] + sizes[: number % 2]
        found += [
            BucketedSample(item.sample, size, (0, 0), size, at) for at, size in enumerate(turned)
        ]
    return config, found


@pytest.mark.parametrize("repeats", [0, 2])
@pytest.mark.parametrize("sizes", [[SIZE] * 3, [(64, 64), (64, 128), (128, 64)]])
def test_each_use_of_an_image_takes_its_next_crop(
    repeats: int, sizes: list[tuple[int, int]]
) -> None:
    made = crops("a", 10, sizes, repeats=repeats)
    found = order(made, batch=4)
    placed = made[1]
    per_epoch = found.batches_per_epoch
    used: dict[str, list[int]] = {}
    for epoch in range(6):
        plans = batches(found, epoch * per_epoch, (epoch + 1) * per_epoch)
        assert {plan.epoch for plan in plans} == {epoch}
        visits = sorted((v.repeat_index, v.sample_index) for p in plans for v in p.visits)
        assert len(visits) == 10 * (repeats + 1), "each image once per pass"
        for _, index in visits:
            used.setdefault(placed[index].sample.id, []).append(placed[index].crop_index)
        for plan in plans:
            assert len({placed[v.sample_index].bucket_px for v in plan.visits}) == 1
            assert 1 <= len(plan.visits) <= 4
    count = 6 * (repeats + 1)
    assert list(used.values()) == [[number % 3 for number in range(count)]] * 10
