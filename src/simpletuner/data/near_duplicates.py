"""Images that look the same although their files differ: copies in another size or quality.

A perceptual hash of 64 bits finds candidates without comparing every image with every other one,
and a small copy of both confirms them. Time and memory grow linearly with the number of images.
Copies that were saved again, resized, brightened or darkened a little are found; mirrored copies
and crops that cut away more than 1 % of each edge are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from simpletuner.config.schema import DataOptions
from simpletuner.data.pixels import load_upright
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sample_types import Sample

HASH_SIDE = 8
HASH_SOURCE_PX = 32
THUMBNAIL_PX = 16
DECODED_PX = 64  # a JPEG is decoded no smaller than this
BAND_BITS = 16
BANDS = HASH_SIDE * HASH_SIDE // BAND_BITS
# Among so many different bits, one of the bands has at most one of them.
MAX_HASH_DISTANCE = 2 * BANDS - 1
# Root of the mean squared difference of two small copies, in levels of 255, without the
# difference of their mean colours. Copies have up to 7.3 in tests/data/test_near_duplicates.py,
# other photograph-like images at least 38, and different drawings on one background at least 11.8.
MAX_THUMBNAIL_ERROR = 8.0
MAX_MEAN_DIFFERENCE = 20.0
# Images of one colour all have the same hash, so the comparisons of each image are bounded.
MAX_CANDIDATES = 256
DECODER_THREADS = 4


@dataclass(frozen=True)
class ImageFingerprint:
    """The look of an image. hash: 64 bits. thumbnail: 16x16 pixels, 3 bytes each."""

    hash: int
    thumbnail: bytes


def fingerprint_image(image: Image.Image) -> ImageFingerprint:
    """Return the fingerprint of an RGB image of any size.

    The hash is the usual one from the discrete cosine transform (pHash, C. Zauner 2010): the 8x8
    lowest frequencies of a grey 32x32 copy, each compared with their median.
    """
    small = image.resize((HASH_SOURCE_PX, HASH_SOURCE_PX), Image.Resampling.BOX)
    grey = np.asarray(small.convert("L"), np.float64)
    # Rounded, so that the last bits of the sums do not decide about the frequencies that are 0.
    frequencies = np.rint(_COSINES @ grey @ _COSINES.T).ravel()
    bits = frequencies > np.median(frequencies[1:])
    bits[0] = False  # the mean brightness
    number = int.from_bytes(np.packbits(bits).tobytes(), "big")
    thumbnail = small.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return ImageFingerprint(number, thumbnail.tobytes())


def _low_frequency_cosines() -> np.ndarray:
    """Return the first rows of the matrix of the discrete cosine transform, (8, 32) float64."""
    frequency = np.arange(HASH_SIDE)[:, None]
    position = np.arange(HASH_SOURCE_PX)[None]
    return np.cos(np.pi * frequency * (2 * position + 1) / (2 * HASH_SOURCE_PX))


_COSINES = _low_frequency_cosines()


def fingerprint_samples(
    samples: Sequence[Sample],
    options: DataOptions,
    advance: Callable[[int], None] = lambda count: None,
) -> list[ImageFingerprint | None]:
    """Decode the images and return their fingerprints in order; None where one is damaged.

    advance: called with the number of images after each of them.
    """

    def read(sample: Sample) -> ImageFingerprint | None:
        try:
            return fingerprint_image(load_upright(sample, options, (DECODED_PX, DECODED_PX)))
        except UnusableFile:
            return None

    fingerprints = []
    with ThreadPoolExecutor(DECODER_THREADS, "fingerprint") as pool:
        for fingerprint in pool.map(read, samples):
            fingerprints.append(fingerprint)
            advance(1)
    return fingerprints


def group_near_duplicates(
    fingerprints: Sequence[ImageFingerprint | None],
) -> list[list[int]]:
    """Return groups of at least two positions whose images look the same, in order.

    Every image of a group looks like its first one. None looks like nothing.
    """
    index = _HashIndex()
    groups: dict[int, list[int]] = {}
    for position, fingerprint in enumerate(fingerprints):
        if fingerprint is None:
            continue
        for first in index.find_near(fingerprint.hash):
            other = fingerprints[first]
            if other is not None and looks_the_same(fingerprint, other):
                groups.setdefault(first, [first]).append(position)
                break
        else:
            index.add(position, fingerprint.hash)
    return sorted(groups.values())


def looks_the_same(one: ImageFingerprint, other: ImageFingerprint) -> bool:
    """Return whether the small copies agree, up to a small change of brightness or colour."""
    difference = _pixels(one) - _pixels(other)
    mean = difference.mean(axis=0)
    error = float(np.sqrt(np.mean((difference - mean) ** 2)))
    return error <= MAX_THUMBNAIL_ERROR and float(np.abs(mean).max()) <= MAX_MEAN_DIFFERENCE


def _pixels(fingerprint: ImageFingerprint) -> np.ndarray:
    return np.frombuffer(fingerprint.thumbnail, np.uint8).reshape(-1, 3).astype(np.float32)


class _HashIndex:
    """Hashes by their bands of 16 bits (multi-index hashing, Norouzi et al. 2012)."""

    def __init__(self) -> None:
        self._hashes: dict[int, int] = {}
        self._bands: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(BANDS)]

    def add(self, position: int, number: int) -> None:
        self._hashes[position] = number
        for band, key in enumerate(_band_keys(number)):
            self._bands[band][key].append(position)

    def find_near(self, number: int) -> list[int]:
        """Return the positions of hashes within MAX_HASH_DISTANCE, the nearest first."""
        distances: dict[int, int] = {}
        for band, key in enumerate(_band_keys(number)):
            table = self._bands[band]
            for probe in (key, *(key ^ (1 << bit) for bit in range(BAND_BITS))):
                for position in table.get(probe, ()):
                    distances[position] = (self._hashes[position] ^ number).bit_count()
        near = sorted(
            (distance, position)
            for position, distance in distances.items()
            if distance <= MAX_HASH_DISTANCE
        )
        return [position for _, position in near[:MAX_CANDIDATES]]


def _band_keys(number: int) -> Iterator[int]:
    for band in range(BANDS):
        yield number >> (band * BAND_BITS) & ((1 << BAND_BITS) - 1)
