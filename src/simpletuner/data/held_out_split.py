"""Choice of the training images that are held out, by content and without near duplicates.

Images that are copies of each other, or look the same, form one group, and a group is held out as a
whole or not at all. Groups are taken in the order of the content hashes of their files, so that the
choice depends neither on names nor on the order of the files, and one more image changes it little.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from simpletuner.config.tuning_constraints import parse_fold
from simpletuner.data.near_duplicates import (
    MAX_MEAN_DIFFERENCE,
    MAX_THUMBNAIL_ERROR,
    ImageFingerprint,
)

DEFAULT_FROM_IMAGES = 200
DEFAULT_SHARE = 1 / 20
DEFAULT_MAX_IMAGES = 64
OFFERED_SHARE = 1 / 10
COARSE_SIDE = 4


@dataclass(frozen=True)
class SplitRequest:
    """Number of images to hold out: `count` of them, or the part `fold` of `folds` (from 1)."""

    count: int = 0
    fold: int = 0
    folds: int = 0


def split_request(
    share: float | None, fold: str | None, image_count: int, has_eval_dataset: bool
) -> SplitRequest | None:
    """Return what the options ask for among `image_count` training images; None for nothing."""
    if fold is not None:
        return SplitRequest(0, *parse_fold(fold))
    if share is None:
        if has_eval_dataset or image_count < DEFAULT_FROM_IMAGES:
            return None
        return SplitRequest(min(DEFAULT_MAX_IMAGES, round(image_count * DEFAULT_SHARE)))
    return SplitRequest(max(1, round(image_count * share))) if share else None


def group_look_alikes(
    contents: Sequence[str], fingerprints: Sequence[ImageFingerprint | None]
) -> Iterator[list[int]]:
    """Yield the positions in groups, in the order of the smallest content hash of each group.

    contents: content hash of each image's file. fingerprints: None where the image cannot be
    decoded; it then forms a group with its exact copies alone. The groups are closed: no image
    looks like one of another group.
    """
    thumbnails = _Thumbnails(fingerprints)
    by_content: dict[str, list[int]] = {}
    for position, content in enumerate(contents):
        by_content.setdefault(content, []).append(position)
    grouped: set[int] = set()
    for start in sorted(range(len(contents)), key=lambda position: (contents[position], position)):
        if start in grouped:
            continue
        # Breadth first: where A resembles B and B resembles C, all three are one group.
        group, reached = [start], 0
        grouped.add(start)
        while reached < len(group):
            position = group[reached]
            reached += 1
            for other in (*by_content[contents[position]], *thumbnails.find_alike(position)):
                if other not in grouped:
                    grouped.add(other)
                    group.append(other)
        yield sorted(group)


def choose_held_out(
    groups: Iterable[Sequence[int]], datasets: Sequence[str], request: SplitRequest
) -> list[int]:
    """Return the positions to hold out, sorted.

    groups: of group_look_alikes. datasets: the dataset of each position; each keeps at least one
    image to train on. A group that would exceed the wanted count is left out, so that fewer may be
    found than were asked for.
    """
    left = Counter(datasets)
    chosen: list[int] = []
    for number, group in enumerate(groups):
        if not request.folds and len(chosen) == request.count:
            break
        if request.folds:
            if number % request.folds != request.fold - 1:
                continue
        elif len(chosen) + len(group) > request.count:
            continue
        taken = Counter(datasets[position] for position in group)
        # A dataset without a training image would silently no longer be trained.
        if any(left[name] <= count for name, count in taken.items()):
            continue
        left -= taken
        chosen += group
    return sorted(chosen)


def split_key(sample_ids: Sequence[str], contents: Sequence[str], request: SplitRequest) -> str:
    """Return a hash of everything that the choice depends on."""
    digest = hashlib.sha256(repr(request).encode())
    for name, content in zip(sample_ids, contents, strict=True):
        digest.update(f"{content} {name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class _Thumbnails:
    """The thumbnails of all images, for comparisons of one with all others.

    The error of 4x4 means is never above that of the whole thumbnails, so it excludes most images
    cheaply. The limits are those of near_duplicates.looks_the_same; the hash is not compared, so
    that rather too many images are found than too few.
    """

    def __init__(self, fingerprints: Sequence[ImageFingerprint | None]) -> None:
        known = [fingerprint for fingerprint in fingerprints if fingerprint is not None]
        side = round((len(known[0].thumbnail) / 3) ** 0.5) if known else COARSE_SIDE
        shape = (len(fingerprints), side, side, 3)
        pixels = np.full(shape, np.nan, np.float32)  # NaN is near nothing
        for position, fingerprint in enumerate(fingerprints):
            if fingerprint is not None:
                row = np.frombuffer(fingerprint.thumbnail, np.uint8)
                pixels[position] = row.reshape(side, side, 3)
        # 4 x 4 means of each thumbnail: 48 numbers to compare instead of hundreds.
        part = side // COARSE_SIDE
        parts = pixels.reshape(len(pixels), COARSE_SIDE, part, COARSE_SIDE, part, 3)
        self._coarse = parts.mean(axis=(2, 4)).reshape(len(pixels), -1, 3)
        self._pixels = pixels.reshape(len(pixels), -1, 3)

    def find_alike(self, position: int) -> list[int]:
        """Return the positions whose thumbnails agree up to a small change of colour."""
        near = np.flatnonzero(_agree(self._coarse, self._coarse[position]))
        near = near[_agree(self._pixels[near], self._pixels[position])]
        return [int(other) for other in near]


def _agree(pixels: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return for each image whether it differs little from `one`. pixels: (N, P, 3)."""
    difference = pixels - one
    mean = difference.mean(axis=1, keepdims=True)
    error = np.sqrt(np.mean((difference - mean) ** 2, axis=(1, 2)))
    near: np.ndarray = (error <= MAX_THUMBNAIL_ERROR) & (
        np.abs(mean).max(axis=(1, 2)) <= MAX_MEAN_DIFFERENCE
    )
    return near
