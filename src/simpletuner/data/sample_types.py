"""What flows out of the data package: one frozen dataclass per arrow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One picture and what may be said about it. Sizes are after EXIF orientation.

    id: "<dataset id>/<path inside it>", POSIX separators, NFC: unique in a run, stable between
    runs. captions: alternatives, at least one; a visit uses one of them.
    """

    id: str
    dataset: str
    path: Path
    width_px: int
    height_px: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class BucketedSample:
    """A sample with the geometry it is trained at.

    resize_px: (width, height) that covers the bucket with the sample's own aspect.
    crop_px: (left, top) of the bucket-sized window inside the resized picture.
    bucket_px: (width, height), multiples of the family's alignment.
    """

    sample: Sample
    resize_px: tuple[int, int]
    crop_px: tuple[int, int]
    bucket_px: tuple[int, int]


@dataclass(frozen=True)
class RejectedFile:
    """A file that is not trained on: reason is a short code, detail a sentence."""

    path: str
    dataset: str
    reason: str
    detail: str


@dataclass(frozen=True)
class SampleVisit:
    """One appearance of a sample in training.

    index: position in the run's tuple of Placed. epoch, pass_: which visit this is (pass_ counts
    repeats inside an epoch). caption: index into sample.captions, None when the caption is dropped
    (empty caption).
    """

    sample_index: int
    round_index: int
    repeat_index: int
    caption_index: int | None


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one bucket that go through the network together. number: global micro-batch index."""

    index: int
    epoch: int
    visits: tuple[SampleVisit, ...]
