from __future__ import annotations

from pathlib import Path

from simpletuner.data.caption_statistics import (
    CaptionStatistics,
    TokenCounter,
    estimate_tokens,
    measure_captions,
)
from simpletuner.data.sample_types import Sample
from simpletuner.data.sources import LocalFile

WORDS = TokenCounter(lambda caption: len(caption.split()) + 1, "words", 6)


def measure(*captions: str | tuple[str, ...], trigger: str | None = None) -> CaptionStatistics:
    samples = [
        Sample(
            f"d/{number}",
            "d",
            LocalFile(Path(f"/{number}")),
            8,
            8,
            (caption,) if isinstance(caption, str) else caption,
        )
        for number, caption in enumerate(captions)
    ]
    return measure_captions(samples, WORDS, trigger)


def test_lengths_and_empty_captions() -> None:
    found = measure("a cat", ("one two three", "one two three four five six"), "")
    assert (found.images, found.captions, found.uncaptioned) == (3, 3, 1)
    assert (found.lengths.shortest, found.lengths.median, found.lengths.longest) == (2, 3, 6)
    assert (found.tokens.longest, found.tokens.over_limit) == (7, 1)
    assert measure("", "").lengths.longest == 0


def test_tags_are_the_short_parts_between_commas() -> None:
    found = measure(
        "1girl, Solo, red hair", "1girl,  solo, a long part that is a sentence, 1girl", "1girl"
    )
    assert [(tag.text, tag.captions) for tag in found.tags] == [("1girl", 2), ("solo", 2)]


def test_phrases_do_not_cross_punctuation_and_short_ones_are_part_of_long_ones() -> None:
    found = measure(
        "a photo of a red barn. Snow falls",
        "a photo of a red barn at night",
        "the red barn, snow and a photo",
    )
    assert [(item.text, item.captions) for item in found.phrases] == [
        ("red barn", 3),
        ("photo", 3),
        ("photo of a red barn", 2),
        ("snow", 2),
    ]


def test_what_stands_in_every_caption_beside_the_trigger() -> None:
    captions = [f"oil painting of Zorbo on a {colour} table" for colour in ("red", "blue", "green")]
    found = measure(*captions, trigger="zorbo")
    assert [item.text for item in found.constant_phrases] == ["oil painting", "table"]
    assert found.trigger is not None
    assert found.trigger.images == 3
    without = measure(*captions)
    assert without.trigger is None
    assert "oil painting of zorbo" in [item.text for item in without.constant_phrases]


def test_trigger_is_whole_words_in_any_case() -> None:
    found = measure("a sks  Dog", "sks dogs", "asks dog", ("cat", "SKS DOG"), trigger="sks dog")
    assert found.trigger is not None
    assert (found.trigger.images, found.trigger.missing_ids) == (2, ("d/1", "d/2"))
    # No competing phrase where the trigger is all there is.
    assert measure("sks dog", "sks dog", trigger="sks dog").constant_phrases == ()


def test_equal_captions_are_compared_without_case_and_spaces() -> None:
    found = measure("A  cat", "a cat", ("dog", "Dog"), "dog", "bird")
    assert [(item.text, item.images, item.sample_ids) for item in found.equal_captions] == [
        ("A  cat", 2, ("d/0", "d/1")),
        ("dog", 2, ("d/2", "d/3")),
    ]


def test_images_with_a_long_or_an_empty_caption_are_listed() -> None:
    found = measure("cat", ("word " * 900, "dog ", "word " * 800), "")
    assert (found.tokens.over_limit, found.long_ids) == (2, ("d/1",))
    assert (found.uncaptioned, found.uncaptioned_ids) == (1, ("d/2",))


def test_the_estimate_of_tokens() -> None:
    assert [estimate_tokens(text) for text in ("", "cat", "a small cat")] == [1, 2, 4]
