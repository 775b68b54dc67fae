"""The latent cache: raw posterior moments of every image at its training size.

It stores moments instead of one sample, so that each visit can sample the posterior again, and it
stores them unscaled, so that a change of scale or shift does not invalidate them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simpletuner.cache.content_hashes import ContentHashes
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.config.schema import DataOptions
from simpletuner.data.pixels import load_pixels
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sample_types import BucketedSample, RejectedFile
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.peers import ALONE, Peers

EncodeImages = Callable[[Tensor], Tensor]
DECODER_THREADS = 4
DOWNLOAD_THREADS = 16  # where images come over a network; they wait most of the time
# Pixels that are encoded at once: one image of 1024 x 1024. The VAE needs 1.35 GB for as many; a
# larger batch of such images is not faster, because one of them fills a GPU.
ENCODER_PIXELS = 1 << 20
PIXELS_VERSION = 1  # increase it when the same file and geometry produce other pixels than before
EncodeJob = tuple[str, BucketedSample]


@dataclass(frozen=True)
class LatentCacheResult:
    """The usable samples with their keys, and the rejected files.

    The moments of placed_samples[i], (2C, H, W), are store.get(latent_keys[i])["moments"]; its mask
    is store.get(mask_keys[i])["mask"], where there is a key. rejected: images that could not be
    read, decoded or encoded; they are not in placed_samples.
    """

    placed_samples: tuple[BucketedSample, ...]
    latent_keys: tuple[str, ...]
    mask_keys: tuple[str, ...]
    rejected: tuple[RejectedFile, ...]


def latent_key(content: str, placed: BucketedSample, options: DataOptions, fingerprint: str) -> str:
    """Hash everything that determines the moments: content, encoder, geometry and background."""
    geometry = (placed.resize_px, placed.crop_px, placed.bucket_px)
    parts = (PIXELS_VERSION, content, fingerprint, geometry, options.alpha_background)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def encode_missing_latents(
    store: TensorStore,
    placed: Sequence[BucketedSample],
    options: DataOptions,
    hashes: ContentHashes | None,
    encoder: Callable[[], EncodeImages],
    emit: Emit,
    batch_size: int = 4,
    peers: Peers = ALONE,
) -> LatentCacheResult:
    """Encode the images that are not cached, bucket by bucket.

    The main process hashes the images (hashes: None on the others). Several processes share out
    whole batches; afterwards the store of each has all latents.

    A few threads decode images ahead of the encoder. encoder: makes the function (B, 3, H, W) in
    [-1, 1] -> moments (B, 2C, h, w); it is called only after a missing image was decoded. An image
    that fails is rejected and the others are encoded. Raises DataError when more than
    options.max_bad_sample_fraction fail.
    """
    slow = any(item.sample.file.is_slow for item in placed)
    with ThreadPoolExecutor(DOWNLOAD_THREADS if slow else DECODER_THREADS, "pixels") as pool:
        keys, rejected, missing = _find_missing(placed, options, hashes, store, pool, emit, peers)
        jobs = {key: sample for key, sample in zip(keys, placed, strict=True) if key in missing}
        batches = list(_iter_bucket_batches(list(jobs.items()), batch_size))
        own = [batch for _, batch in peers.share(batches)]
        failed = _encode_images(store, own, options, encoder, pool, emit) if own else {}
    if batches:
        failed = {
            key: tuple(why) for part in peers.gather_json(failed) for key, why in part.items()
        }
        store.adopt_new_shards()
    return _usable_samples(placed, keys, rejected, failed, options.max_bad_sample_fraction)


def _usable_samples(
    placed: Sequence[BucketedSample],
    keys: Sequence[str],
    unreadable: Sequence[RejectedFile],
    failed: Mapping[str, tuple[str, ...]],
    max_bad_fraction: float,
) -> LatentCacheResult:
    """Return what is cached; an image of which one crop fails is not used at all.

    unreadable: the images without a key. failed: see _encode_images.
    """
    bad = {
        sample.sample.id: _make_rejected(sample, *failed[key])
        for key, sample in zip(keys, placed, strict=True)
        if key in failed
    }
    rejected = [*unreadable, *bad.values()]
    unusable = bad.keys() | {
        sample.sample.id for key, sample in zip(keys, placed, strict=True) if not key
    }
    images = sum(sample.crop_index == 0 for sample in placed)
    check_rejected_images(rejected, images, max_bad_fraction)
    pairs = [
        (sample, key)
        for key, sample in zip(keys, placed, strict=True)
        if sample.sample.id not in unusable
    ]
    return LatentCacheResult(
        tuple(sample for sample, _ in pairs),
        tuple(key for _, key in pairs),
        ("",) * len(pairs),
        tuple(rejected),
    )


def check_rejected_images(
    rejected: Sequence[RejectedFile], images: int, max_bad_fraction: float
) -> None:
    """Raise DataError when more images are unusable than max_bad_sample_fraction allows."""
    if len(rejected) > max_bad_fraction * images:
        raise DataError(
            f"{len(rejected)} of {images} images cannot be used, more than"
            f" max_bad_sample_fraction = {max_bad_fraction:g} allows. The first:"
            f" {rejected[0].path}: {rejected[0].detail}"
        )


def _find_missing(
    placed: Sequence[BucketedSample],
    options: DataOptions,
    hashes: ContentHashes | None,
    store: TensorStore,
    pool: ThreadPoolExecutor,
    emit: Emit,
    peers: Peers,
) -> tuple[list[str], list[RejectedFile], set[str]]:
    """Return one key per image, the rejected files and the keys that are not cached."""
    survey: tuple[list[str], list[dict[str, str]], list[str]] | None = None
    if hashes is not None:
        keys, rejected = _compute_latent_keys(
            placed, options, hashes, store.fingerprint, pool, emit
        )
        missing = store.missing_keys(key for key in keys if key)
        survey = keys, [dataclasses.asdict(file) for file in rejected], missing
    keys, records, missing = peers.broadcast_json(survey)
    return keys, [RejectedFile(**record) for record in records], set(missing)


def _compute_latent_keys(
    placed: Sequence[BucketedSample],
    options: DataOptions,
    hashes: ContentHashes,
    fingerprint: str,
    pool: ThreadPoolExecutor,
    emit: Emit,
) -> tuple[list[str], list[RejectedFile]]:
    """Return one key per image ("" where the file cannot be read) and the rejected files."""

    def content(sample: BucketedSample) -> str | OSError:
        try:
            return hashes.hash_file(sample.sample.file)
        except OSError as error:
            return error

    keys = []
    rejected: dict[str, RejectedFile] = {}
    with StageReporter(emit, "hash", len(placed), "files") as stage:
        # In parts, because map() submits all its jobs at once.
        for start in range(0, len(placed), 1000):
            part = placed[start : start + 1000]
            for sample, digest in zip(part, pool.map(content, part), strict=True):
                if isinstance(digest, OSError):
                    detail = f"cannot be read: {digest.strerror or digest}"
                    rejected[sample.sample.id] = _make_rejected(sample, "unreadable", detail)
                    keys.append("")
                else:
                    keys.append(latent_key(digest, sample, options, fingerprint))
                stage.advance()
    return keys, list(rejected.values())


def _encode_images(
    store: TensorStore,
    batches: Sequence[list[EncodeJob]],
    options: DataOptions,
    encoder: Callable[[], EncodeImages],
    pool: ThreadPoolExecutor,
    emit: Emit,
) -> dict[str, tuple[str, str]]:
    """Return key -> (reason, detail) of the images that could not be encoded."""
    failed: dict[str, tuple[str, str]] = {}
    encode: EncodeImages | None = None
    count = sum(map(len, batches))
    with StageReporter(emit, "encode images", count, "images") as stage, store.flush_on_exit():
        for batch in _decode_ahead(iter(batches), options, pool):
            decoded = []
            for (key, _), pixels in batch:
                if isinstance(pixels, UnusableFile):
                    failed[key] = (pixels.reason, str(pixels))
                else:
                    decoded.append((key, pixels))
            if decoded:
                encode = encode or encoder()
                # One bucket, so all images of a batch have one size.
                stacked = torch.from_numpy(np.stack([pixels for _, pixels in decoded]))
                moments = encode(stacked.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0)
                for (key, _), image_moments in zip(decoded, moments, strict=True):
                    # A VAE in bf16 or fp16 overflows on some images; stored, they would spoil every
                    # later step.
                    if bool(torch.isfinite(image_moments).all()):
                        store.put(key, {"moments": image_moments})
                    else:
                        failed[key] = (
                            "nonfinite_latent",
                            "its latent holds NaN or infinity; set vae_dtype = fp32",
                        )
            stage.advance(len(batch))
        stage.summary = f"{len(failed)} could not be encoded" if failed else ""
    return failed


def _iter_bucket_batches(jobs: Sequence[EncodeJob], batch_size: int) -> Iterator[list[EncodeJob]]:
    """Yield batches of one bucket, of at most batch_size images and ENCODER_PIXELS pixels."""
    buckets: dict[tuple[int, int], list[EncodeJob]] = {}
    for job in jobs:
        buckets.setdefault(job[1].bucket_px, []).append(job)
    for bucket in sorted(buckets):
        count = min(batch_size, max(1, ENCODER_PIXELS // (bucket[0] * bucket[1])))
        for start in range(0, len(buckets[bucket]), count):
            yield buckets[bucket][start : start + count]


def _decode_ahead(
    batches: Iterator[list[EncodeJob]], options: DataOptions, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[EncodeJob, np.ndarray | UnusableFile]]]:
    """Yield the pixels of each batch while the next two batches are being decoded."""

    def pixels(job: EncodeJob) -> np.ndarray | UnusableFile:
        try:
            return load_pixels(job[1], options)
        except UnusableFile as error:
            return error

    ahead: deque[list[tuple[EncodeJob, Future[np.ndarray | UnusableFile]]]] = deque()
    for batch in batches:
        ahead.append([(job, pool.submit(pixels, job)) for job in batch])
        # Two batches ahead keep the threads busy; more would only take memory.
        if len(ahead) > 2:
            yield [(job, future.result()) for job, future in ahead.popleft()]
    while ahead:
        yield [(job, future.result()) for job, future in ahead.popleft()]


def _make_rejected(placed: BucketedSample, reason: str, detail: str) -> RejectedFile:
    return RejectedFile(placed.sample.file.address, placed.sample.dataset, reason, detail)
