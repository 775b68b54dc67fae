"""Which training images are held out: by content, without near duplicates, whatever their names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.config.schema import RunConfig
from simpletuner.config.tuning_constraints import find_tuning_errors, parse_fold
from simpletuner.data.held_out_split import (
    SplitRequest,
    choose_held_out,
    group_look_alikes,
    split_key,
    split_request,
)
from simpletuner.data.near_duplicates import fingerprint_image
from simpletuner.errors import ConfigError


def scene(number: int) -> Image.Image:
    """A smooth image of random colours: twelve of them look like twelve photographs."""
    small = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC)


def content(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def groups_of(images: Sequence[Image.Image]) -> list[list[int]]:
    prints = [fingerprint_image(image) for image in images]
    return list(group_look_alikes([content(image) for image in images], prints))


def test_the_default_begins_at_200_images_and_ends_at_64() -> None:
    assert split_request(None, None, 199, False) is None
    assert split_request(None, None, 200, False) == SplitRequest(10)
    assert split_request(None, None, 10_000, False) == SplitRequest(64)
    assert split_request(None, None, 10_000, True) is None  # an eval dataset is enough
    assert split_request(0.0, None, 10_000, False) is None
    assert split_request(0.01, None, 20, True) == SplitRequest(1)
    assert split_request(None, "2/3", 20, False) == SplitRequest(0, 2, 3)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/1"])
def test_a_part_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="at least two parts"):
        parse_fold(text)
    run = RunConfig()
    tuning = run.tuning.model_copy(update={"validation_fold": text, "validation_split": 0.1})
    found = dict(find_tuning_errors(run.model_copy(update={"tuning": tuning})))
    assert set(found) == {"validation_fold"}


def test_near_duplicates_stay_together() -> None:
    images = [scene(number) for number in range(12)]
    smaller = images[3].resize((60, 60)).resize((96, 96))
    brighter = images[3].point(lambda value: min(255, value + 6))
    groups = groups_of([*images, smaller, brighter, images[5].copy()])
    assert sorted(map(sorted, (group for group in groups if len(group) > 1))) == [
        [3, 12, 13], [5, 14],
    ]  # fmt: skip
    assert sorted(position for group in groups for position in group) == list(range(15))


def test_a_chain_of_likeness_is_one_group() -> None:
    """The first and the last differ, but each looks like the next."""
    first, last = scene(0), scene(0).point(lambda value: min(255, value + 30))
    between = scene(0).point(lambda value: min(255, value + 15))
    assert groups_of([first, last, between]) == [[0, 1, 2]]
    assert len(groups_of([first, last])) == 2


def test_no_held_out_image_looks_like_a_trained_one() -> None:
    images = [scene(number) for number in range(20)]
    images += [image.resize((80, 80)) for image in images[:10]]
    for count in range(1, 12):
        held = choose_held_out(groups_of(images), ["d"] * 30, SplitRequest(count))
        assert len(held) <= count
        assert {at % 20 for at in held}.isdisjoint({at % 20 for at in set(range(30)) - set(held)})


def test_the_choice_follows_the_content_and_not_the_order() -> None:
    images = [scene(number) for number in range(12)]
    held = choose_held_out(groups_of(images), ["d"] * 12, SplitRequest(4))
    turned = images[::-1]
    again = choose_held_out(groups_of(turned), ["d"] * 12, SplitRequest(4))
    assert {content(images[at]) for at in held} == {content(turned[at]) for at in again}
    more = [*images, scene(99)]
    grown = choose_held_out(groups_of(more), ["d"] * 13, SplitRequest(4))
    assert len({content(more[at]) for at in grown} & {content(images[at]) for at in held}) >= 3


def test_folds_divide_everything() -> None:
    images = [scene(number) for number in range(10)]
    parts = [
        choose_held_out(groups_of(images), ["d"] * 10, SplitRequest(0, fold, 3))
        for fold in (1, 2, 3)
    ]
    assert sorted(position for part in parts for position in part) == list(range(10))
    assert {len(part) for part in parts} == {3, 4}


def test_every_dataset_keeps_an_image_to_train_on() -> None:
    images = [scene(number) for number in range(6)]
    datasets = ["a", "b", "b", "b", "b", "b"]
    held = choose_held_out(groups_of(images), datasets, SplitRequest(6))
    assert 0 not in held
    assert len(held) == 4


def test_damaged_images_are_compared_by_content_alone() -> None:
    assert list(group_look_alikes(["b", "a", "b"], [None, None, None])) == [[1], [0, 2]]


def test_the_key_changes_with_what_the_choice_depends_on(tmp_path: Path) -> None:
    keys = {
        split_key(["a", "b"], ["1", "2"], SplitRequest(1)),
        split_key(["a", "b"], ["1", "2"], SplitRequest(2)),
        split_key(["a", "b"], ["1", "3"], SplitRequest(1)),
        split_key(["a", "c"], ["1", "2"], SplitRequest(1)),
    }
    assert len(keys) == 4
