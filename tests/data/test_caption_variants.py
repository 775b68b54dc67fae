"""Variants, filters and weights of captions: what they make of a caption, and that it stays so."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.caption_filters import apply_filters
from simpletuner.data.caption_variants import CaptionVariants
from simpletuner.data.dataset_config import DatasetConfig, DatasetFile
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.data.sample_order import SampleOrder
from simpletuner.data.sample_types import BucketedSample
from simpletuner.data.scan import scan_datasets
from simpletuner.errors import ConfigError
from tests.data.unusable_files import encode_image, noise_image

TAGS = "zorbo, a cube, a ball, red, blue, on a table"


def tags(caption: str) -> list[str]:
    return caption.split(", ")


def test_variants_are_other_orders_of_the_same_tags() -> None:
    variants = CaptionVariants(count=20, position_start=1)
    original, *made = variants.of_caption(TAGS, run_seed=1)
    assert (original, len(made)) == (TAGS, 20)
    assert all(
        tags(text)[0] == "zorbo" and sorted(tags(text)) == sorted(tags(TAGS)) for text in made
    )
    assert len(set(made)) > 15
    assert Counter(tags(text)[1] for text in made).most_common(1)[0][1] < 12


def test_variants_are_a_pure_function_of_seed_caption_and_number() -> None:
    many = CaptionVariants(count=6, include_original=False)
    assert many.of_caption(TAGS, 1) == many.of_caption(TAGS, 1) != many.of_caption(TAGS, 2)
    fewer = CaptionVariants(count=3, include_original=False)
    assert fewer.of_caption(TAGS, 1) == many.of_caption(TAGS, 1)[:3]
    own = CaptionVariants(count=6, include_original=False, seed=2)
    assert own.of_caption(TAGS, 1) == many.of_caption(TAGS, 2)
    # The same numbers as on any other machine and in any later version.
    expected = ("d, b, a, c", "a, d, c, b", "c, b, d, a")
    assert many.of_caption("a, b, c, d", 42)[:3] == expected


@pytest.mark.parametrize(
    ("split_on", "caption", "parts"),
    [
        ("comma", "a b,c ,, d", {"a b", "c", "d"}),
        ("space", "a b  c", {"a", "b", "c"}),
        ("period", "One cat. Two dogs. Rain.", {"One cat", "Two dogs", "Rain"}),
    ],
)
def test_each_separator(split_on: str, caption: str, parts: set[str]) -> None:
    joint = {"comma": ", ", "space": " ", "period": ". "}[split_on]
    (text,) = CaptionVariants(split_on=split_on, include_original=False).of_caption(caption, 0)
    assert set(text.removesuffix(".").split(joint)) == parts
    assert text.endswith(".") == caption.endswith(".")


def test_tag_dropout_leaves_tags_out_at_its_rate_and_never_all() -> None:
    drop = CaptionVariants(64, reorder=False, tag_dropout=0.3, include_original=False)
    made = [text for seed in range(20) for text in drop.of_caption(TAGS, seed)]
    missing = 6 * len(made) - sum(len(tags(text)) for text in made)
    assert 0.27 < missing / (6 * len(made)) < 0.33
    order = {tag: place for place, tag in enumerate(tags(TAGS))}
    assert all(sorted(tags(text), key=order.__getitem__) == tags(text) for text in made)
    hard = CaptionVariants(64, position_start=1, tag_dropout=0.99, include_original=False)
    assert all(tags(text)[0] == "zorbo" for text in hard.of_caption(TAGS, 0))
    alone = CaptionVariants(64, tag_dropout=0.99, include_original=False)
    assert all(alone.of_caption("a, b", 0)), "an empty caption is caption_dropout_probability's"


@pytest.mark.parametrize(
    ("filters", "caption", "expected"),
    [
        (["dog"], "a dog, a cat", "a, a cat"),
        (["a dog"], "a dog, a cat, ", "a cat"),
        (["blurry"], "sharp, blurry, blurry, old", "sharp, old"),
        ([r"\d+ ?px"], "a cat, 512px, 64 px", "a cat"),
        (["1.5"], "1.5 of 125", "of 125"),
        (["C++"], "a book of C++", "a book of"),
        (["C++"], "a book", "a book"),
        (["s/cats?/dog/"], "two cats", "two dog"),
        (["s/cat/dog"], "a cat", "a dog"),
        ([r"s/(\w+) cat/cat \1/"], "a red cat", "a cat red"),
        ([r"s/a\/b/a or b/"], "a/b", "a or b"),
        (["s/cat/dog/", "dog"], "cat, bird", "bird"),
        (["none of it"], "left ,  as it is,", "left ,  as it is,"),
    ],
)
def test_filters(filters: list[str], caption: str, expected: str) -> None:
    assert apply_filters(caption, filters) == expected


def read(folder: Path, *entries: dict[str, Any], **options: Any) -> DatasetFile:
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (photos / f"{name}.png").write_bytes(encode_image(noise_image(), "PNG"))
        (photos / f"{name}.txt").write_text(f"{name} one, blurry, red\n{name} two, blurry\n")
    path = folder / "multidatabackend.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return read_dataset_file(path, DataOptions(**options), {})


PHOTOS = {"id": "photos", "instance_data_dir": "photos"}
SHUFFLE = {"enable": True, "count": 2, "position_start": 1, "seed": 3}


def scanned(found: DatasetFile, seed: int = 1) -> tuple[BucketedSample, ...]:
    datasets = [*found.train, *found.eval]
    options = DataOptions(resolution=64)
    return scan_datasets(datasets, options, seed, lambda event: None, alignment_px=64).samples


def test_filter_shuffle_weights_and_prompt_meet_in_a_sample(tmp_path: Path) -> None:
    fields = {
        "caption_shuffle": SHUFFLE,
        "caption_filter_list": ["blurry"],
        "caption_weights": [3, 1],
        "instance_prompt": ["p", "q"],
        "prepend_instance_prompt": True,
    }
    sample = scanned(read(tmp_path, {**PHOTOS, **fields}))[0].sample
    assert sample.captions[0] == "p a one, red"
    assert sample.captions[3] == "p a two"
    assert len(sample.captions) == 2 * 2 * 3
    assert sample.caption_weights == (3.0, 3.0, 3.0, 1.0, 1.0, 1.0) * 2
    assert {caption[:4] for caption in sample.captions} == {"p a ", "q a "}


def test_filters_of_text_sets_reach_the_datasets_that_use_them(tmp_path: Path) -> None:
    (tmp_path / "filter.txt").write_text("blurry\n\ns/one/first/\n")
    (tmp_path / "filter.json").write_text('["red"]')
    default = {"id": "t", "dataset_type": "text_embeds", "default": True}
    other = {"id": "u", "dataset_type": "text_embeds", "caption_filter_list": "filter.json"}
    held = {"id": "held", "dataset_type": "eval", "instance_data_dir": "photos"}
    found = read(
        tmp_path,
        {**PHOTOS, "caption_shuffle": {"enable": False, "count": 9}},
        {**PHOTOS, "id": "linked", "text_embeds": "u"},
        {**PHOTOS, "id": "own", "caption_filter_list": ["a"], "text_embeds": "u"},
        held,
        {**default, "caption_filter_list": "filter.txt"},
        other,
    )
    assert [dataset.caption_filters for dataset in (*found.train, *found.eval)] == [
        ("blurry", "s/one/first/"),
        ("red",),
        ("a",),
        ("blurry", "s/one/first/"),
    ]
    assert found.train[0].caption_variants is None
    (tmp_path / "held").mkdir()
    for name in ("c", "d"):
        (tmp_path / f"held/{name}.png").write_bytes(encode_image(noise_image((96, 66)), "PNG"))
        (tmp_path / f"held/{name}.txt").write_text("one, blurry, red")
    alone = read(
        tmp_path,
        {**PHOTOS, "caption_shuffle": SHUFFLE},
        {**held, "instance_data_dir": "held", "caption_shuffle": SHUFFLE},
        {**default, "caption_filter_list": "filter.txt"},
    )
    evaluated = [item.sample for item in scanned(alone) if item.sample.dataset == "held"]
    assert [sample.captions for sample in evaluated] == [("first, red",)] * 2
    assert "held.caption_shuffle has no effect" in alone.notices[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"caption_shuffle": {"enable": True, "cuont": 2}},
            "caption_shuffle: cuont: unknown; did you",
        ),
        ({"caption_shuffle": {"enable": True, "count": 0}}, "count = 0: must be at least 1"),
        ({"caption_shuffle": {"split_on": "|"}}, "split_on: allowed: comma, space, period"),
        ({"caption_shuffle": {"enable": True, "reorder": False}}, "it needs a tag_dropout"),
        ({"caption_shuffle": {"tag_dropout": 1}}, "must be at least 0, less than 1"),
        ({"caption_filter_list": "none.txt"}, "cannot be read: No such file"),
        ({"caption_filter_list": [""]}, '"" is not a filter'),
        ({"caption_filter_list": ["s/(/x/"]}, "is not a regular expression"),
        ({"caption_weights": []}, "caption_weights"),
        ({"caption_weights": [0]}, "caption_weights"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, {**PHOTOS, **fields})
    assert any(message in problem.message for problem in caught.value.problems), caught.value


def test_a_filter_that_leaves_nothing_is_a_missing_caption(tmp_path: Path) -> None:
    found = read(tmp_path, {**PHOTOS, "caption_filter_list": [".+"]})
    options = DataOptions(resolution=64, missing_caption="filename")
    samples = scan_datasets(found.train, options, 1, lambda event: None, alignment_px=64).samples
    assert [item.sample.captions for item in samples] == [("a",), ("b",)]


def test_weights_decide_how_often_a_caption_is_used(tmp_path: Path) -> None:
    found = read(tmp_path, {**PHOTOS, "repeats": 999, "caption_weights": [3, 1]})
    order = SampleOrder(
        scanned(found), found.train, 1, 8, DataOptions(caption_dropout_probability=0)
    )
    visits = [
        v for number in range(order.batches_per_epoch) for v in order.micro_batch(number).visits
    ]
    shares = Counter(visit.caption_index for visit in visits)
    assert shares.total() == 2000
    assert 1430 < shares[0] < 1570


def test_every_variant_of_a_run_has_its_row(
    tmp_path: Path, dataset: Callable[..., DatasetConfig]
) -> None:
    """The variants of a sample are its captions: what is encoded is what is trained on."""
    found = read(tmp_path, {**PHOTOS, "caption_shuffle": SHUFFLE})
    placed = scanned(found)
    order = SampleOrder(placed, found.train, 1, 2, DataOptions(caption_dropout_probability=0))
    used = {
        placed[visit.sample_index].sample.captions[visit.caption_index or 0]
        for number in range(100)
        for visit in order.micro_batch(number).visits
    }
    assert used == {caption for item in placed for caption in item.sample.captions}
    assert placed == scanned(found), "a second start finds the same"
    assert placed == scanned(found, seed=2), "caption_shuffle has a seed of its own"
