"""Data types of the data package, one frozen dataclass per stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpletuner.data.sources import SourceFile


@dataclass(frozen=True, slots=True)
class SampleMask:
    """The source of the mask of an image.

    file: None is the image itself. channel: the luminance of its colours, or its alpha.
    """

    file: SourceFile | None
    channel: Literal["luminance", "alpha"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its captions. Sizes are after EXIF orientation.

    id: "<dataset id>/<path inside it>", POSIX separators, NFC: unique in a run, stable between
    runs. captions: alternatives, at least one; one of them is used each time the sample is trained.
    caption_weights: one per caption, or empty where all are used equally often. weight: how often
    the sample is used, relative to the others of its bucket. mask: None where all of the image is
    trained.
    """

    id: str
    dataset: str
    file: SourceFile
    width_px: int
    height_px: int
    captions: tuple[str, ...]
    caption_weights: tuple[float, ...] = ()
    weight: float = 1.0
    mask: SampleMask | None = None


@dataclass(frozen=True, slots=True)
class BucketedSample:
    """A sample with the geometry it is trained at.

    resize_px: (width, height) that covers the bucket with the sample's own aspect ratio. crop_px:
    (left, top) of the bucket-sized window inside the resized image. bucket_px: (width, height),
    multiples of the family's alignment. crop_index: a sample with several crops (crops_per_image)
    stands once for each, one after the other.
    """

    sample: Sample
    resize_px: tuple[int, int]
    crop_px: tuple[int, int]
    bucket_px: tuple[int, int]
    crop_index: int = 0


@dataclass(frozen=True)
class RejectedFile:
    """A file that is not trained on: reason is a short code, detail a sentence."""

    path: str
    dataset: str
    reason: str
    detail: str


@dataclass(frozen=True)
class SampleVisit:
    """One use of a sample in training.

    sample_index: position in the run's tuple of samples. round_index, repeat_index: which use it
    is; repeats are counted inside a round. caption_index: index into sample.captions, None when the
    caption is dropped (empty caption).
    """

    sample_index: int
    round_index: int
    repeat_index: int
    caption_index: int | None


@dataclass(frozen=True)
class MicroBatchPlan:
    """Samples of one bucket that are trained together.

    index: number of the micro-batch in the run.
    """

    index: int
    epoch: int
    visits: tuple[SampleVisit, ...]
