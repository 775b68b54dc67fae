"""Statistics of captions: lengths, frequent tags and phrases, equal captions."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from simpletuner.data.sample_types import Sample

MAX_PHRASE_WORDS = 5
MAX_TAG_WORDS = 5
MAX_LISTED = 40
MAX_LISTED_IDS = 12
# A phrase in this fraction of the captions is learnt as a part of the concept.
CONSTANT_FRACTION = 0.9
FREQUENT_FRACTION = 0.02  # rarer phrases are not counted, which bounds the memory
SEGMENT_END = re.compile(r"[,.;:!?()\[\]{}\"|/\n]+")
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by for from has have he her his in into is it its of on or over "
        "she that the their there they this to under was we which while who with",
    )
)
Phrase = tuple[str, ...]


@dataclass(frozen=True)
class TextCount:
    """A tag or phrase in lower case, and the number of captions that hold it."""

    text: str
    captions: int


@dataclass(frozen=True)
class EqualCaptions:
    """One caption of several images. sample_ids: at most MAX_LISTED_IDS of them."""

    text: str
    images: int
    sample_ids: tuple[str, ...]


@dataclass(frozen=True)
class LengthSummary:
    """Lengths of captions. over_limit: captions longer than the limit, None without a limit."""

    shortest: int
    median: float
    longest: int
    over_limit: int | None = None


@dataclass(frozen=True)
class TriggerCoverage:
    """Number of images with the trigger in a caption. missing_ids: at most MAX_LISTED_IDS."""

    trigger: str
    images: int
    missing_ids: tuple[str, ...]


@dataclass(frozen=True)
class CaptionStatistics:
    """Statistics of all captions, alternatives of an image counted one by one.

    uncaptioned: images whose caption is empty; uncaptioned_ids and long_ids: at most MAX_LISTED_IDS
    of these and of the images with a caption above token_limit. lengths: in words. tokens: in the
    tokens of the text encoder, with the end token. token_source: the tokenizer, or how tokens were
    estimated. tags: parts between commas. phrases: of up to five words, a shorter one left out
    where it stands nearly always in a longer one. constant_phrases: those in at least
    CONSTANT_FRACTION of the captions, without the trigger. All lists begin with the most frequent.
    """

    images: int
    captions: int
    uncaptioned: int
    uncaptioned_ids: tuple[str, ...]
    long_ids: tuple[str, ...]
    lengths: LengthSummary
    tokens: LengthSummary
    token_limit: int
    token_source: str
    tags: tuple[TextCount, ...]
    phrases: tuple[TextCount, ...]
    constant_phrases: tuple[TextCount, ...]
    equal_captions: tuple[EqualCaptions, ...]
    trigger: TriggerCoverage | None


@dataclass(frozen=True)
class TokenCounter:
    """count: tokens of one caption, with the end token. source: what counts, for the reader."""

    count: Callable[[str], int]
    source: str
    limit: int


def measure_captions(
    samples: Sequence[Sample], tokens: TokenCounter, trigger: str | None
) -> CaptionStatistics:
    """Count and compare the captions; linear in their number. samples: at least one."""
    owned = [(sample.id, text) for sample in samples for text in sample.captions if text]
    captions = [caption for _, caption in owned]
    lengths = [len(WORD.findall(caption)) for caption in captions]
    counts = [tokens.count(caption) for caption in captions]
    long = [name for (name, _), count in zip(owned, counts, strict=True) if count > tokens.limit]
    uncaptioned = [sample.id for sample in samples if not any(sample.captions)]
    pattern = trigger_pattern(trigger) if trigger else None
    phrases = _count_phrases(captions, pattern)
    least = CONSTANT_FRACTION * len(captions)
    constant = {phrase: count for phrase, count in phrases.items() if count >= least}
    listed = {
        phrase: count
        for phrase, count in phrases.items()
        if len(phrase) > 1 or phrase[0] not in STOP_WORDS
    }
    return CaptionStatistics(
        images=len(samples),
        captions=len(captions),
        uncaptioned=len(uncaptioned),
        uncaptioned_ids=tuple(uncaptioned[:MAX_LISTED_IDS]),
        long_ids=tuple(dict.fromkeys(long))[:MAX_LISTED_IDS],
        lengths=_summarize(lengths),
        tokens=_summarize(counts, len(long)),
        token_limit=tokens.limit,
        token_source=tokens.source,
        tags=_most_frequent(_count_tags(captions)),
        phrases=_most_frequent(_maximal_phrases(listed)),
        constant_phrases=_most_frequent(_maximal_phrases(constant)) if len(captions) > 1 else (),
        equal_captions=_find_equal_captions(samples),
        trigger=_trigger_coverage(samples, trigger, pattern) if trigger and pattern else None,
    )


def trigger_pattern(trigger: str) -> re.Pattern[str]:
    """Return the pattern of a trigger: its words with any case and spaces, as whole words."""
    words = r"\s+".join(re.escape(word) for word in trigger.split())
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def estimate_tokens(caption: str) -> int:
    """Return a rough number of tokens: one per four characters, and the end token."""
    return -(-len(caption) // 4) + 1


def _summarize(values: Sequence[int], over: int | None = None) -> LengthSummary:
    if not values:
        return LengthSummary(0, 0.0, 0, over)
    return LengthSummary(min(values), median(values), max(values), over)


def _count_tags(captions: Iterable[str]) -> Counter[Phrase]:
    """Count the short parts between commas; a caption without a comma has no tags."""
    tag_counts: Counter[Phrase] = Counter()
    for caption in captions:
        parts = [" ".join(part.lower().split()) for part in caption.split(",")]
        if len(parts) > 1:
            tag_counts.update({(part,) for part in parts if 0 < len(part.split()) <= MAX_TAG_WORDS})
    return Counter({tag: count for tag, count in tag_counts.items() if count > 1})


def _count_phrases(captions: Sequence[str], trigger: re.Pattern[str] | None) -> dict[Phrase, int]:
    """Return the frequent phrases with the number of captions that hold each.

    A phrase can only be frequent if the phrases inside it are (R. Agrawal and R. Srikant 1994), so
    each length is counted from the frequent ones before it, and memory stays small.
    """
    least = max(2, FREQUENT_FRACTION * len(captions))
    frequent: dict[Phrase, int] = {}
    for length in range(1, MAX_PHRASE_WORDS + 1):
        phrase_counts: Counter[Phrase] = Counter()
        for caption in captions:
            # A set, because captions are counted, not occurrences.
            phrase_counts.update(set(_candidates(caption, trigger, length, frequent)))
        common = {phrase: count for phrase, count in phrase_counts.items() if count >= least}
        if not common:
            break
        frequent.update(common)
    return {phrase: count for phrase, count in frequent.items() if not set(phrase) <= STOP_WORDS}


def _candidates(
    caption: str, trigger: re.Pattern[str] | None, length: int, frequent: dict[Phrase, int]
) -> Iterator[Phrase]:
    # A line break ends a segment, so no phrase spans the place of the trigger.
    text = caption if trigger is None else trigger.sub("\n", caption)
    for segment in SEGMENT_END.split(text.lower()):
        words = WORD.findall(segment)
        for start in range(len(words) - length + 1):
            phrase = tuple(words[start : start + length])
            if length == 1 or (phrase[:-1] in frequent and phrase[1:] in frequent):
                yield phrase


def _maximal_phrases(counts: dict[Phrase, int]) -> dict[Phrase, int]:
    """Leave out phrases that are part of a longer one nearly as often, and outer stop words."""
    trimmed: dict[Phrase, int] = {}
    for phrase, count in counts.items():
        words = list(phrase)
        while words and words[0] in STOP_WORDS:
            words.pop(0)
        while words and words[-1] in STOP_WORDS:
            words.pop()
        if words:
            trimmed[tuple(words)] = max(count, trimmed.get(tuple(words), 0))
    contained: dict[Phrase, int] = defaultdict(int)
    for phrase, count in trimmed.items():
        for length in range(1, len(phrase)):
            for start in range(len(phrase) - length + 1):
                part = phrase[start : start + length]
                contained[part] = max(contained[part], count)
    return {
        phrase: count
        for phrase, count in trimmed.items()
        if contained[phrase] < CONSTANT_FRACTION * count
    }


def _most_frequent(counts: dict[Phrase, int]) -> tuple[TextCount, ...]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], -len(item[0]), item[0]))
    return tuple(TextCount(" ".join(phrase), count) for phrase, count in ordered[:MAX_LISTED])


def _find_equal_captions(samples: Sequence[Sample]) -> tuple[EqualCaptions, ...]:
    """Return captions that several images have, compared without case and extra spaces."""
    owners: dict[str, list[str]] = defaultdict(list)
    spellings: dict[str, str] = {}
    for sample in samples:
        for caption in sample.captions:
            key = " ".join(caption.lower().split())
            if key and (not owners[key] or owners[key][-1] != sample.id):
                owners[key].append(sample.id)
                spellings.setdefault(key, caption)
    shared = sorted(
        (item for item in owners.items() if len(item[1]) > 1), key=lambda item: -len(item[1])
    )
    return tuple(
        EqualCaptions(spellings[key], len(ids), tuple(ids[:MAX_LISTED_IDS]))
        for key, ids in shared[:MAX_LISTED]
    )


def _trigger_coverage(
    samples: Sequence[Sample], trigger: str, pattern: re.Pattern[str]
) -> TriggerCoverage:
    missing = [
        sample.id
        for sample in samples
        if not any(pattern.search(caption) for caption in sample.captions)
    ]
    return TriggerCoverage(trigger, len(samples) - len(missing), tuple(missing[:MAX_LISTED_IDS]))
