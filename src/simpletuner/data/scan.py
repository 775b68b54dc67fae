"""Scan of datasets: from files to samples in buckets, by names, headers and captions.

Nothing is decoded, and nothing is written to the dataset folders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from simpletuner.config.model_families import BUCKET_ALIGNMENT_PX, DEFAULT_FAMILY
from simpletuner.config.schema import DataOptions
from simpletuner.data import geometry
from simpletuner.data.caption_tables import read_caption_table
from simpletuner.data.captions import caption_weights, read_captions
from simpletuner.data.crop_assignment import assign_crops
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.duplicates import check_no_leaks, find_identical_files
from simpletuner.data.header_reader import HeaderReader
from simpletuner.data.image_files import ImageFile, find_image_files
from simpletuner.data.masks import check_mask, find_masks, masked_count_notices
from simpletuner.data.pixels import ImageHeader
from simpletuner.data.rejections import (
    UnusableFile,
    check_rejected_fraction,
    format_rejected,
    make_printable,
    write_rejected,
)
from simpletuner.data.remote_store import RemoteStore
from simpletuner.data.sample_types import BucketedSample, RejectedFile, Sample
from simpletuner.data.source_types import caption_table_file
from simpletuner.data.sources import SourceFile
from simpletuner.errors import DataError
from simpletuner.events.event_types import DatasetScanned, Emit, NoticeIssued, WarningIssued
from simpletuner.events.formatting import count_of
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.randomness import seed_at

READER_THREADS = 8
FILES_PER_CHUNK = 64
SLOW_READER_THREADS = 32
SLOW_FILES_PER_CHUNK = 8
MAX_SUFFIXES_LISTED = 8
ENLARGEMENT_THRESHOLD = 1.25  # factor of the side from which a notice is given
ReadResult = tuple[list[BucketedSample], ImageHeader] | RejectedFile


@dataclass(frozen=True)
class ScanResult:
    """Result of a scan.

    samples: sorted by id; one with several crops stands once for each crop. rejected: sorted by
    dataset and path.
    """

    samples: tuple[BucketedSample, ...]
    rejected: tuple[RejectedFile, ...]


def scan_datasets(
    datasets: Sequence[DatasetConfig],
    options: DataOptions,
    seed: int,
    emit: Emit,
    *,
    alignment_px: int = BUCKET_ALIGNMENT_PX[DEFAULT_FAMILY],
    rejected_path: Path | None = None,
    store: RemoteStore | None = None,
) -> ScanResult:
    """Read every header and caption and assign every image to a bucket.

    seed: of the run, for crop_style random. rejected_path: where the list of rejected files is
    written, also when the scan ends in an error. store: for datasets that are not a folder of this
    machine. Raises DataError for captions missing under
    missing_caption error, more unusable files than max_bad_sample_fraction, an empty folder, no
    sample to train on, or an image both trained on and held out.
    """
    files, rejected, notes = _list_files(datasets, store, emit)
    remarks: Counter[tuple[str, str]] = Counter()
    placed: list[BucketedSample] = []
    with StageReporter(emit, "scan", len(files), "images") as stage:
        tables = _read_tables(datasets, files, notes, store)
        headers = HeaderReader(options.max_image_megapixels, store)
        boxes = {dataset.id: dataset.choices.box_by_path() for dataset in datasets}
        read_one = partial(_read_file, options, seed, alignment_px, tables, boxes)
        for read in _read_files(files, headers, read_one, stage):
            if isinstance(read, RejectedFile):
                rejected.append(read)
                continue
            crops, header = read
            placed += crops
            name = crops[0].sample.dataset
            remarks.update((name, remark) for remark in _header_notices(header))
        placed.sort(key=lambda item: (item.sample.id, item.crop_index))
        placed = _limit_samples(datasets, placed)
        images = [item for item in placed if item.crop_index == 0]
        rejected.sort(key=lambda item: (item.dataset, item.path))
        stage.summary = f"{len(images)} kept, {len(rejected)} rejected"
    notes += [
        f"{name}: {count_of(count, 'image')} {remark}"
        for (name, remark), count in sorted(remarks.items())
    ]
    notes += masked_count_notices(images)
    copies = find_identical_files((item.sample.file for item in images), headers.facts)
    _emit_results(datasets, images, rejected, (*notes, *_shared_file_notices(images)), copies, emit)
    if rejected_path is not None:
        write_rejected(rejected_path, rejected)
    held = {dataset.id for dataset in datasets if dataset.dataset_type == "eval"}
    trained = [item for item in images if item.sample.dataset not in held]
    idle = not trained and len(held) < len(datasets)
    _check_results(len(images), idle or not images, rejected, options, rejected_path)
    check_no_leaks(trained, [item for item in images if item.sample.dataset in held], copies)
    if store is not None:
        store.keep_failures()
    return ScanResult(tuple(placed), tuple(rejected))


def _list_files(
    datasets: Sequence[DatasetConfig], store: RemoteStore | None, emit: Emit
) -> tuple[list[ImageFile], list[RejectedFile], list[str]]:
    """Return the images of all datasets, the files with unusable names, and notices."""
    images: list[ImageFile] = []
    rejected: list[RejectedFile] = []
    notes: list[str] = []
    for dataset in datasets:
        named, misnamed, unread, notices = find_image_files(dataset, store, emit)
        notes += [f"{dataset.id}: {notice}" for notice in notices]
        kinds = ", ".join(
            f"{count} {kind}" for kind, count in unread.most_common(MAX_SUFFIXES_LISTED)
        )
        if not named and not misnamed:
            only = f", only {kinds}" if unread else ""
            raise DataError(f"{dataset.id}: no images in {dataset.address}{only}")
        if unread:
            skipped = count_of(unread.total(), "file")
            notes.append(f"{dataset.id}: skipped {skipped} that cannot be used: {kinds}")
        named, maskless, mask_notes = find_masks(dataset, named, store, emit)
        notes += mask_notes
        images += named
        rejected += [*misnamed, *maskless]
    return images, rejected, notes


def _read_files(
    images: Sequence[ImageFile],
    headers: HeaderReader,
    read: Callable[[HeaderReader, ImageFile], ReadResult],
    stage: StageReporter,
) -> Iterator[ReadResult]:
    # Threads overlap the waits for the disk and the network. Chunks, because a future per file
    # costs more than its header. The results are in the order of the files.
    slow = any(image.file.is_slow for image in images)
    size = SLOW_FILES_PER_CHUNK if slow else FILES_PER_CHUNK
    chunks = [images[start : start + size] for start in range(0, len(images), size)]

    def read_chunk(chunk: Sequence[ImageFile]) -> list[ReadResult]:
        with headers.remembered(chunk) as reader:
            return [read(reader, image) for image in chunk]

    pool = ThreadPoolExecutor(SLOW_READER_THREADS if slow else READER_THREADS, "scan")
    try:
        for results in pool.map(read_chunk, chunks):
            yield from results
            stage.advance(len(results))
    finally:
        # A stop or an error must not wait for the thousands of files that are queued.
        pool.shutdown(cancel_futures=True)


def _read_tables(
    datasets: Sequence[DatasetConfig],
    images: Sequence[ImageFile],
    notes: list[str],
    store: RemoteStore | None,
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return dataset id -> relative path -> captions, for datasets with a table of captions."""
    tables: dict[str, dict[str, tuple[str, ...]]] = {}
    for dataset in datasets:
        if dataset.caption_table is None:
            continue
        paths = [image.relative_path for image in images if image.dataset.id == dataset.id]
        file = caption_table_file(dataset.caption_table, dataset, store)
        tables[dataset.id], notice = read_caption_table(dataset.caption_table, paths, file)
        notes += [f"{dataset.id}: {notice}"] if notice else []
    return tables


def _read_file(
    options: DataOptions,
    seed: int,
    alignment_px: int,
    tables: Mapping[str, Mapping[str, tuple[str, ...]]],
    boxes: Mapping[str, Mapping[str, geometry.CropBox]],
    headers: HeaderReader,
    image: ImageFile,
) -> ReadResult:
    dataset = image.dataset
    sample_id = f"{dataset.id}/{image.relative_path}"
    try:
        header = headers.read(image)
        box = boxes[dataset.id].get(image.relative_path)
        crops = assign_crops(
            dataset.resize_crop, header.size_px, sample_id, seed, alignment_px, box
        )
        mask = check_mask(image.mask, header, options.max_image_megapixels)
        from_table = None
        if image.row is not None:
            from_table = image.row.captions
        elif dataset.id in tables:
            from_table = tables[dataset.id].get(image.relative_path, ())
        captions = read_captions(dataset, image.file, image.caption_file, options, from_table, seed)
    except UnusableFile as error:
        return RejectedFile(image.relative_path, dataset.id, error.reason, str(error))
    sample = Sample(
        id=sample_id,
        dataset=dataset.id,
        file=image.file,
        width_px=header.size_px[0],
        height_px=header.size_px[1],
        # A held-out loss of several captions would measure the choice among them.
        captions=captions[:1] if dataset.dataset_type == "eval" else captions,
        caption_weights=caption_weights(dataset, len(captions)),
        weight=1.0 if image.row is None else image.row.weight,
        mask=mask,
    )
    return [BucketedSample(sample, *crop, number) for number, crop in enumerate(crops)], header


def _header_notices(header: ImageHeader) -> list[str]:
    holds = {
        "with animation (the first frame is used)": header.is_animated,
        "with transparency (laid over alpha_background)": header.has_alpha,
        "in CMYK (converted to sRGB)": header.mode == "CMYK",
    }
    return [remark for remark, applies in holds.items() if applies]


def _limit_samples(
    datasets: Sequence[DatasetConfig], placed: list[BucketedSample]
) -> list[BucketedSample]:
    """Apply max_num_samples.

    The samples with the smallest hashes are used, so that one more file changes the subset by at
    most one sample.
    """
    chosen: set[str] = set()
    for dataset in datasets:
        ids = [
            item.sample.id
            for item in placed
            if item.sample.dataset == dataset.id and item.crop_index == 0
        ]
        if dataset.max_num_samples is not None:
            # Without the run's seed: two runs compare only where they train on the same images.
            ids = sorted(ids, key=lambda name: seed_at(0, "max_num_samples", name))[
                : dataset.max_num_samples
            ]
        chosen.update(ids)
    return [item for item in placed if item.sample.id in chosen]


def _emit_results(
    datasets: Sequence[DatasetConfig],
    placed: Sequence[BucketedSample],
    rejected: Sequence[RejectedFile],
    notes: Sequence[str],
    copies: Sequence[Sequence[SourceFile]],
    emit: Emit,
) -> None:
    for dataset in datasets:
        mine = [item for item in placed if item.sample.dataset == dataset.id]
        buckets = Counter(item.bucket_px for item in mine)
        reasons = Counter(item.reason for item in rejected if item.dataset == dataset.id)
        table = tuple((width, height, count) for (width, height), count in sorted(buckets.items()))
        emit(DatasetScanned(dataset.id, buckets.total(), table, dict(reasons)))
        if not buckets:
            emit(WarningIssued(f"{dataset.id}: none of its images can be used"))
        grown = [(item.resize_px[0] / item.sample.width_px, item.sample.file.name) for item in mine]
        grown = sorted(pair for pair in grown if pair[0] >= ENLARGEMENT_THRESHOLD)
        if grown:
            most = f"{grown[-1][1]} by {grown[-1][0]:.1f}"
            problem = (
                f"{dataset.id}: {count_of(len(grown), 'image')} "
                f"{'is' if len(grown) == 1 else 'are'} enlarged, {most}; see minimum_image_size"
            )
            emit(NoticeIssued(make_printable(problem)))
    for note in notes:
        emit(NoticeIssued(make_printable(note)))
    if copies:
        first, second = copies[0][:2]
        extra = sum(len(group) - 1 for group in copies)
        verb = "is a copy of another" if extra == 1 else "are copies of others"
        problem = f"{count_of(extra, 'image')} {verb}, such as {second.name} of {first.name}"
        emit(WarningIssued(make_printable(problem)))


def _shared_file_notices(placed: Sequence[BucketedSample]) -> list[str]:
    uses = Counter(item.sample.file for item in placed)
    shared = [file for file, count in uses.items() if count > 1]
    if not shared:
        return []
    verb = "is" if len(shared) == 1 else "are"
    return [
        f"{count_of(len(shared), 'image')} {verb} in more than one dataset, such as "
        f"{shared[0].address}"
    ]


def _check_results(
    usable: int,
    idle: bool,
    rejected: Sequence[RejectedFile],
    options: DataOptions,
    listed: Path | None,
) -> None:
    uncaptioned = [item for item in rejected if item.reason == "caption_missing"]
    if uncaptioned:
        how = "Add the missing captions, or set missing_caption to empty, filename or drop."
        files = format_rejected(uncaptioned, listed)
        verb = "has" if len(uncaptioned) == 1 else "have"
        count = count_of(len(uncaptioned), "image")
        raise DataError(f"{count} {verb} no caption. {how}\n{files}")
    check_rejected_fraction(rejected, usable, options.max_bad_sample_fraction, listed)
    if idle:
        raise DataError(f"there is no image to train on.\n{format_rejected(rejected, listed)}")
