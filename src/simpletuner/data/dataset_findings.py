"""Warnings about datasets, each with what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from simpletuner.data.caption_statistics import MAX_LISTED_IDS, CaptionStatistics
from simpletuner.data.rejections import FILTER_REASONS
from simpletuner.data.statistics import BLUR_LIMIT_PX, DatasetStatistics, MeasuredImage
from simpletuner.events.formatting import count_of

LARGE_CROP = 0.25  # fraction of an image
MAX_LISTED_PHRASES = 3


@dataclass(frozen=True)
class Finding:
    """One warning or note. code: stable, for programs. advice: what to do, a sentence.

    sample_ids: at most MAX_LISTED_IDS of the images that it is about.
    """

    level: Literal["warning", "note"]
    code: str
    message: str
    advice: str
    sample_ids: tuple[str, ...] = ()


def find_problems(statistics: DatasetStatistics) -> tuple[Finding, ...]:
    """Return warnings first, then notes, each in the order of this file."""
    findings = [
        *_file_findings(statistics),
        *_copy_findings(statistics),
        *_pixel_findings(statistics),
        *_caption_findings(statistics),
        *_trigger_findings(statistics.captions),
        *_length_findings(statistics),
    ]
    return tuple(sorted(findings, key=lambda finding: finding.level != "warning"))


def _file_findings(statistics: DatasetStatistics) -> Iterator[Finding]:
    reasons: Counter[str] = Counter()
    for dataset in statistics.datasets:
        reasons.update(dataset.rejected)
    filtered = {reason: count for reason, count in reasons.items() if reason in FILTER_REASONS}
    broken = {reason: count for reason, count in reasons.items() if reason not in FILTER_REASONS}
    if broken:
        yield Finding(
            "warning",
            "unusable_files",
            f"{count_of(sum(broken.values()), 'file')} cannot be used ({_list_counts(broken)})",
            "Replace or remove them; a training skips them, and refuses to start if they are more "
            "than max_bad_sample_fraction.",
            _broken_files(statistics),
        )
    excluded = filtered.pop("excluded", 0)
    if excluded:
        yield Finding(
            "note",
            "excluded_images",
            f"{count_of(excluded, 'image')} in exclude",
            "They are not trained on; take them out of exclude to use them.",
        )
    if filtered:
        yield Finding(
            "note",
            "filtered_files",
            f"{count_of(sum(filtered.values()), 'file')} outside your limits "
            f"({_list_counts(filtered)})",
            "Change minimum_image_size, max_upscale_threshold or the aspect ratio limits to use "
            "them.",
        )
    if statistics.damaged:
        yield Finding(
            "warning",
            "damaged_images",
            f"{count_of(len(statistics.damaged), 'image')} cannot be decoded",
            "Save them again from the originals, or remove them.",
            statistics.damaged[:MAX_LISTED_IDS],
        )


def _broken_files(statistics: DatasetStatistics) -> tuple[str, ...]:
    """Return the first files that are no filter's doing, named as images are."""
    names = [
        f"{file.dataset}/{file.path}"
        for file in statistics.rejected
        if file.reason not in FILTER_REASONS
    ]
    return tuple(names[:MAX_LISTED_IDS])


def _copy_findings(statistics: DatasetStatistics) -> Iterator[Finding]:
    held = {facts.id for facts in statistics.datasets if facts.dataset_type == "eval"}
    groups = (*statistics.identical, *statistics.near)
    leaks = [group for group in groups if len({_dataset_of(name) in held for name in group}) > 1]
    if leaks:
        yield Finding(
            "warning",
            "held_out_leak",
            f"{count_of(len(leaks), 'image')} both held out and trained on, exactly or nearly",
            "Remove them from one of the two datasets; the held-out loss would be too low.",
            _first_ids(leaks),
        )
    same, alike = (
        count_of(statistics.identical_count, "group"),
        count_of(statistics.near_count, "group"),
    )
    for code, listed, message in (
        ("identical_images", statistics.identical, f"{same} of images that are the same file"),
        ("near_duplicates", statistics.near, f"{alike} of images that look nearly the same"),
    ):
        if listed:
            yield Finding(
                "warning",
                code,
                message,
                "Keep the best one of each group: every copy counts like one more repeat, and is "
                "what is memorised first.",
                _first_ids(listed),
            )


def _pixel_findings(statistics: DatasetStatistics) -> Iterator[Finding]:
    if statistics.enlarged_count:
        largest = statistics.enlarged[0].value
        yield Finding(
            "warning",
            "enlarged_images",
            f"{count_of(statistics.enlarged_count, 'image')} smaller than the training size, "
            f"enlarged by up to {largest:.1f}",
            "Find larger originals, lower resolution, or skip them with max_upscale_threshold 0.25 "
            "in the dataset.",
            _ids(statistics.enlarged),
        )
    if statistics.blurred_count:
        yield Finding(
            "warning",
            "blurred_images",
            f"{count_of(statistics.blurred_count, 'image')} with no edge sharper than "
            f"{BLUR_LIMIT_PX:g} px at the training size",
            "Look at them and remove those that are out of focus or enlarged elsewhere; softness "
            "is learnt like any style.",
            _ids(statistics.blurred),
        )
    if statistics.blank:
        yield Finding(
            "warning",
            "blank_images",
            f"{count_of(len(statistics.blank), 'image')} of nearly one colour",
            "Remove them unless that is what you train.",
            statistics.blank[:MAX_LISTED_IDS],
        )
    cropped = sum(bucket.images for bucket in statistics.buckets if bucket.cropped >= LARGE_CROP)
    if cropped:
        yield Finding(
            "warning",
            "large_crops",
            f"{count_of(cropped, 'image')} in buckets that crop {LARGE_CROP:.0%} or more away",
            'Look at the contact sheet; "crop": false keeps whole images, and "crop_aspect": '
            '"closest" crops less than "square".',
        )


def _caption_findings(statistics: DatasetStatistics) -> Iterator[Finding]:
    captions = statistics.captions
    if captions.uncaptioned:
        yield Finding(
            "warning",
            "missing_captions",
            f"{count_of(captions.uncaptioned, 'image')} without a caption",
            "Write captions, or choose what happens: missing_caption empty, filename or drop. "
            "Otherwise a training does not start.",
            captions.uncaptioned_ids,
        )
    if captions.tokens.over_limit:
        yield Finding(
            "warning",
            "long_captions",
            f"{count_of(captions.tokens.over_limit, 'caption')} longer than the limit of "
            f"{captions.token_limit} tokens ({captions.token_source})",
            "Shorten them, with what matters first: the end is cut off.",
            captions.long_ids,
        )
    equal = captions.equal_captions
    if not equal:
        return
    if equal[0].images == captions.images:
        yield Finding(
            "note",
            "one_caption",
            f"all images have the caption {equal[0].text!r}",
            "What they share and what differs is learnt under the same words; captions that "
            "describe what differs keep it changeable by the prompt.",
        )
    else:
        images = sum(item.images for item in equal)
        yield Finding(
            "warning",
            "equal_captions",
            f"{count_of(len(equal), 'caption')} shared by {images} images, such as "
            f"{_shorten(equal[0].text)!r}",
            "Describe what differs between those images, or it cannot be asked for.",
            equal[0].sample_ids,
        )


def _trigger_findings(captions: CaptionStatistics) -> Iterator[Finding]:
    constant = [item.text for item in captions.constant_phrases[:MAX_LISTED_PHRASES]]
    phrases = ", ".join(map(repr, constant))
    if captions.trigger is None:
        if constant:
            yield Finding(
                "note",
                "constant_phrases",
                f"in at least nine of ten captions: {phrases}",
                "These words will call what you train. Give the one you want with --trigger to see "
                "what competes with it.",
            )
        return
    missing = captions.images - captions.trigger.images
    if missing:
        yield Finding(
            "warning",
            "trigger_missing",
            f"{captions.trigger.trigger!r} is missing in the captions of "
            f"{count_of(missing, 'image')} of {captions.images}",
            "Add it, or set instance_prompt and prepend_instance_prompt true.",
            captions.trigger.missing_ids,
        )
    if constant:
        yield Finding(
            "warning",
            "competing_phrases",
            f"in at least nine of ten captions besides {captions.trigger.trigger!r}: {phrases}",
            "What you train is learnt under these words as well; leave them out or vary them.",
        )


def _length_findings(statistics: DatasetStatistics) -> Iterator[Finding]:
    rare = [facts for facts in statistics.datasets if facts.passes is not None and facts.passes < 1]
    if rare:
        names = ", ".join(f"{facts.id} ({facts.passes:.2f} passes)" for facts in rare)
        yield Finding(
            "warning",
            "unseen_images",
            f"the run ends before every image was used once: {names}",
            "Raise max_train_steps or the batch size, or set num_train_epochs instead.",
        )


def _list_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def _dataset_of(sample_id: str) -> str:
    return sample_id.partition("/")[0]


def _first_ids(groups: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(name for group in groups for name in group)[:MAX_LISTED_IDS]


def _ids(images: Sequence[MeasuredImage]) -> tuple[str, ...]:
    return tuple(image.sample_id for image in images[:MAX_LISTED_IDS])


def _shorten(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
