"""Statistics of datasets before a training: sizes, buckets, captions, copies, sharpness, passes.

Everything is counted in one pass over the files, linear in the number of images; nothing is written
to the dataset folders. simpletuner inspect prints what `inspect_datasets` returns.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

from simpletuner.config.model_families import BUCKET_ALIGNMENT_PX, DEFAULT_FAMILY
from simpletuner.config.schema import DataOptions
from simpletuner.data.caption_statistics import CaptionStatistics, TokenCounter, measure_captions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.duplicates import find_identical_files
from simpletuner.data.image_quality import Sharpness, measure_sharpness
from simpletuner.data.near_duplicates import (
    ImageFingerprint,
    fingerprint_image,
    group_near_duplicates,
)
from simpletuner.data.pixels import load_upright
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.sample_order import SampleOrder
from simpletuner.data.sample_types import BucketedSample, RejectedFile
from simpletuner.data.scan import ENLARGEMENT_THRESHOLD, scan_datasets
from simpletuner.events.event_types import (
    Emit,
    Event,
    NoticeIssued,
    StageCompleted,
    StageProgress,
    StageStarted,
    WarningIssued,
)
from simpletuner.events.stage_reporter import StageReporter

MAX_LISTED_IMAGES = 50
MAX_LISTED_GROUPS = 50
# Standard deviation of the blur at the size of training from which an image is listed; see
# tests/data/test_image_quality.py for what this is on drawn and photograph-like images.
BLUR_LIMIT_PX = 2.0
DECODER_THREADS = 4


@dataclass(frozen=True)
class TrainingLength:
    """Length of a run.

    batch_size: of a micro-batch. micro_batches: of an optimizer step, over all processes. steps:
    None where epochs are given instead.
    """

    batch_size: int
    micro_batches: int
    steps: int | None
    epochs: int | None


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset.

    rejected: reason -> files. passes: predicted uses of each image in the run, on average; None for
    a held-out dataset.
    """

    id: str
    dataset_type: str
    images: int
    rejected: Mapping[str, int]
    passes: float | None


@dataclass(frozen=True)
class BucketFacts:
    """One bucket. cropped: mean fraction of the resized image outside the bucket, in [0, 1]."""

    width_px: int
    height_px: int
    images: int
    cropped: float


@dataclass(frozen=True)
class SizeFacts:
    """Sizes of the images as (width, height) in px; smallest, median and largest by area."""

    smallest_px: tuple[int, int]
    median_px: tuple[int, int]
    largest_px: tuple[int, int]
    megapixels: float


@dataclass(frozen=True)
class MeasuredImage:
    """A number about one image, by the id of its sample."""

    sample_id: str
    value: float


@dataclass(frozen=True)
class DatasetStatistics:
    """Facts about all datasets of a run.

    images: usable ones. rejected: at most MAX_LISTED_IMAGES. buckets: the fullest first. enlarged:
    value is the factor of the side, the largest first. blurred: value is the blur in px at the size
    of training, the most blurred first. blank: images of nearly one colour. identical, near: groups
    of sample ids; a group in `identical` is not repeated in `near`. pixels_read: False where the
    images were not decoded, so that blurred, blank and near are empty. *_count: of the complete
    lists. notes: what the scan reported.
    """

    datasets: tuple[DatasetFacts, ...]
    images: int
    sizes: SizeFacts
    buckets: tuple[BucketFacts, ...]
    captions: CaptionStatistics
    steps: int | None
    rejected_count: int
    rejected: tuple[RejectedFile, ...]
    enlarged_count: int
    enlarged: tuple[MeasuredImage, ...]
    pixels_read: bool
    blurred_count: int
    blurred: tuple[MeasuredImage, ...]
    blank: tuple[str, ...]
    damaged: tuple[str, ...]
    identical_count: int
    identical: tuple[tuple[str, ...], ...]
    near_count: int
    near: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PixelMeasurements:
    """The look of one image, and its sharpness at the size of training."""

    fingerprint: ImageFingerprint
    sharpness: Sharpness


def inspect_datasets(
    datasets: Sequence[DatasetConfig],
    options: DataOptions,
    length: TrainingLength,
    tokens: TokenCounter,
    *,
    seed: int = 0,
    trigger: str | None = None,
    read_pixels: bool = True,
    alignment_px: int = BUCKET_ALIGNMENT_PX[DEFAULT_FAMILY],
    emit: Emit,
    store: RemoteStore | None = None,
) -> tuple[DatasetStatistics, tuple[BucketedSample, ...]]:
    """Scan and measure all datasets; return the statistics and the samples they are about.

    Missing captions and unusable files are counted instead of raised. emit: receives the progress.
    store: for datasets that are not a folder of this machine, open as long as the samples are read.
    Raises DataError for a folder without images.
    """
    placed, rejected, notes = _scan(datasets, options, seed, alignment_px, emit, store)
    measured: list[PixelMeasurements | None] = [None] * len(placed)
    if read_pixels:
        measured = _measure_pixels(placed, options, emit)
    enlarged = _rank_images(
        {item.sample.id: item.resize_px[0] / item.sample.width_px for item in placed},
        ENLARGEMENT_THRESHOLD,
    )
    sharp = {item.sample.id: pixels.sharpness for item, pixels in zip(placed, measured) if pixels}
    blurred = _rank_images(
        {name: pixels.blur_px for name, pixels in sharp.items() if pixels.blur_px is not None},
        BLUR_LIMIT_PX,
    )
    identical, near = _group_copies(placed, measured)
    steps, facts = _describe_datasets(datasets, placed, rejected, seed, length, options)
    return DatasetStatistics(
        datasets=facts,
        images=len(placed),
        sizes=_describe_sizes(placed),
        buckets=_describe_buckets(placed),
        captions=measure_captions([item.sample for item in placed], tokens, trigger),
        steps=steps,
        rejected_count=len(rejected),
        rejected=rejected[:MAX_LISTED_IMAGES],
        enlarged_count=len(enlarged),
        enlarged=enlarged[:MAX_LISTED_IMAGES],
        pixels_read=read_pixels,
        blurred_count=len(blurred),
        blurred=blurred[:MAX_LISTED_IMAGES],
        blank=tuple(name for name, pixels in sharp.items() if pixels.blur_px is None),
        damaged=tuple(
            item.sample.id
            for item, pixels in zip(placed, measured)
            if read_pixels and pixels is None
        ),
        identical_count=len(identical),
        identical=identical[:MAX_LISTED_GROUPS],
        near_count=len(near),
        near=near[:MAX_LISTED_GROUPS],
        notes=notes,
    ), placed


def _scan(
    datasets: Sequence[DatasetConfig],
    options: DataOptions,
    seed: int,
    alignment_px: int,
    emit: Emit,
    store: RemoteStore | None,
) -> tuple[tuple[BucketedSample, ...], tuple[RejectedFile, ...], tuple[str, ...]]:
    """Return samples, rejected files and what the scan reported; nothing is an error."""
    notes: list[str] = []

    def collect(event: Event) -> None:
        if isinstance(event, (NoticeIssued, WarningIssued)):
            notes.append(event.message)
        elif isinstance(event, (StageStarted, StageProgress, StageCompleted)):
            emit(event)

    lenient: dict[str, object] = {"max_bad_sample_fraction": 1.0}
    if options.missing_caption == "error":
        lenient["missing_caption"] = "empty"
    # A held-out image that is also trained on is a finding here, not an error.
    as_trained = [
        dataclasses.replace(
            dataset,
            dataset_type="image",
            caption_variants=None,
            resize_crop=dataclasses.replace(dataset.resize_crop, crops_per_image=1),
        )
        for dataset in datasets
    ]
    scanned = scan_datasets(
        as_trained,
        options.model_copy(update=lenient),
        seed,
        collect,
        alignment_px=alignment_px,
        store=store,
    )
    return scanned.samples, scanned.rejected, tuple(notes)


def _measure_pixels(
    placed: Sequence[BucketedSample], options: DataOptions, emit: Emit
) -> list[PixelMeasurements | None]:
    def measure(item: BucketedSample) -> PixelMeasurements | None:
        try:
            image = load_upright(item.sample, options, item.resize_px)
        except UnusableFile:
            return None
        look = fingerprint_image(image)
        if image.width > item.resize_px[0]:  # an enlarged one is listed for that already
            image = image.resize(item.resize_px)
        return PixelMeasurements(look, measure_sharpness(image))

    measurements: list[PixelMeasurements | None] = []
    with (
        StageReporter(emit, "look at images", len(placed), "images") as stage,
        ThreadPoolExecutor(DECODER_THREADS, "inspect") as pool,
    ):
        for result in pool.map(measure, placed):
            measurements.append(result)
            stage.advance()
    return measurements


def _rank_images(values: Mapping[str, float], least: float) -> tuple[MeasuredImage, ...]:
    ranked = sorted(
        ((name, value) for name, value in values.items() if value >= least),
        key=lambda pair: (-pair[1], pair[0]),
    )
    return tuple(MeasuredImage(name, round(value, 3)) for name, value in ranked)


def _group_copies(
    placed: Sequence[BucketedSample], measured: Sequence[PixelMeasurements | None]
) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """Return the groups of equal files, and of other images that look the same."""
    by_file: dict[object, list[str]] = defaultdict(list)
    for item in placed:
        by_file[item.sample.file].append(item.sample.id)
    equal = find_identical_files(item.sample.file for item in placed)
    shared = [names for names in by_file.values() if len(names) > 1]
    identical = [[name for file in group for name in by_file[file]] for group in equal]
    covered = {name for group in identical for name in group}
    identical += [names for names in shared if not covered.issuperset(names)]
    group_of = {name: number for number, group in enumerate(identical) for name in group}
    near = []
    looks = [None if pixels is None else pixels.fingerprint for pixels in measured]
    for group in group_near_duplicates(looks):
        names = tuple(placed[index].sample.id for index in group)
        known = {group_of.get(name) for name in names}
        if len(known) > 1 or None in known:
            near.append(names)
    return tuple(tuple(sorted(group)) for group in identical), tuple(near)


def _describe_datasets(
    datasets: Sequence[DatasetConfig],
    placed: Sequence[BucketedSample],
    rejected: Sequence[RejectedFile],
    seed: int,
    length: TrainingLength,
    options: DataOptions,
) -> tuple[int | None, tuple[DatasetFacts, ...]]:
    """Return the number of optimizer steps and the facts about each dataset."""
    counts: dict[str, int] = defaultdict(int)
    reasons: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for item in placed:
        counts[item.sample.dataset] += 1
    for file in rejected:
        reasons[file.dataset][file.reason] += 1
    trained = [dataset for dataset in datasets if dataset.dataset_type != "eval"]
    names = {dataset.id for dataset in trained}
    used = [item for item in placed if item.sample.dataset in names]
    passes: Mapping[str, float] = {}
    steps = None
    if used:
        per_step = length.micro_batches
        order = SampleOrder(used, trained, seed, length.batch_size, options, per_step)
        end = order.timeline.first_number(length.epochs or 1) or order.timeline.end_number or 0
        steps = length.steps or math.ceil(end / per_step)
        before = order.passes_before(steps * per_step)
        passes = {name: round(count, 2) for name, count in before.items()}
    return steps, tuple(
        DatasetFacts(
            dataset.id,
            dataset.dataset_type,
            counts[dataset.id],
            dict(reasons[dataset.id]),
            passes.get(dataset.id),
        )
        for dataset in datasets
    )


def _describe_sizes(placed: Sequence[BucketedSample]) -> SizeFacts:
    sizes = sorted(
        ((item.sample.width_px, item.sample.height_px) for item in placed),
        key=lambda size: (size[0] * size[1], size),
    )
    areas = [width * height for width, height in sizes]
    return SizeFacts(sizes[0], sizes[len(sizes) // 2], sizes[-1], round(median(areas) / 1e6, 2))


def _describe_buckets(placed: Sequence[BucketedSample]) -> tuple[BucketFacts, ...]:
    cropped: dict[tuple[int, int], list[float]] = defaultdict(list)
    for item in placed:
        inside = math.prod(item.bucket_px) / math.prod(item.resize_px)
        cropped[item.bucket_px].append(1 - inside)
    facts = [
        BucketFacts(*size, len(values), round(sum(values) / len(values), 4))
        for size, values in cropped.items()
    ]
    return tuple(sorted(facts, key=lambda bucket: (-bucket.images, bucket.width_px)))
