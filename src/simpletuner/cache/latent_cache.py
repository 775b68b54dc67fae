"""The latent cache: raw posterior moments of every picture at the size it is trained at.

Moments rather than one sample, so that each visit may draw afresh; unscaled, so that a change of scale or
shift invalidates nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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

EncodeImages = Callable[[Tensor], Tensor]
DECODER_THREADS = 4
PIXELS_VERSION = 1  # to be raised when the same file and geometry give other pixels than before
EncodeJob = tuple[str, BucketedSample]


@dataclass(frozen=True)
class LatentCacheResult:
    """What training goes on with. The moments of placed[i], (2C, H, W), are store.get(keys[i])["moments"].

    rejected: pictures that could not be read, decoded or encoded; `placed` has none of them.
    """

    placed_samples: tuple[BucketedSample, ...]
    latent_keys: tuple[str, ...]
    rejected: tuple[RejectedFile, ...]


def latent_key(content: str, placed: BucketedSample, options: DataOptions, fingerprint: str) -> str:
    """Hash of everything that decides the moments: file content, encoder, geometry, background."""
    geometry = (placed.resize_px, placed.crop_px, placed.bucket_px)
    parts = (PIXELS_VERSION, content, fingerprint, geometry, options.alpha_background)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def encode_missing_latents(
    store: TensorStore,
    placed: Sequence[BucketedSample],
    options: DataOptions,
    hashes: ContentHashes,
    encoder: Callable[[], EncodeImages],
    emit: Emit,
    batch_size: int = 4,
) -> LatentCacheResult:
    """Encode what is missing, bucket by bucket, with pictures decoded a little ahead by a few threads.

    encoder: makes the function (B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w); called only when a missing
    picture has been decoded. A picture that fails is rejected and the work goes on; DataError when more than
    options.max_bad_sample_fraction fail.
    """
    with ThreadPoolExecutor(DECODER_THREADS, "pixels") as pool:
        keys, bad = _compute_latent_keys(placed, options, hashes, store.fingerprint, pool, emit)
        missing = set(store.missing_keys(key for key in keys if key))
        jobs = {key: one for key, one in zip(keys, placed, strict=True) if key in missing}
        failed = (
            _encode_images(store, list(jobs.items()), options, encoder, pool, emit, batch_size)
            if jobs
            else {}
        )
    kept, kept_keys = [], []
    for key, one in zip(keys, placed, strict=True):
        if key in failed:
            bad.append(_make_rejected(one, *failed[key]))
        elif key:
            kept.append(one)
            kept_keys.append(key)
    if len(bad) > options.max_bad_sample_fraction * len(placed):
        raise DataError(
            f"{len(bad)} of {len(placed)} pictures cannot be used, more than max_bad_sample_fraction = "
            f"{options.max_bad_sample_fraction:g} allows. The first: {bad[0].path}: {bad[0].detail}"
        )
    return LatentCacheResult(tuple(kept), tuple(kept_keys), tuple(bad))


def _compute_latent_keys(
    placed: Sequence[BucketedSample],
    options: DataOptions,
    hashes: ContentHashes,
    fingerprint: str,
    pool: ThreadPoolExecutor,
    emit: Emit,
) -> tuple[list[str], list[RejectedFile]]:
    """One key per picture, "" where the file cannot be read."""

    def content(one: BucketedSample) -> str | OSError:
        try:
            return hashes.hash_file(one.sample.path)
        except OSError as error:
            return error

    keys, bad = [], []
    with StageReporter(emit, "hash", len(placed), "files") as stage:
        for start in range(0, len(placed), 1000):  # map() makes all its jobs at once
            part = placed[start : start + 1000]
            for one, found in zip(part, pool.map(content, part), strict=True):
                if isinstance(found, OSError):
                    bad.append(
                        _make_rejected(
                            one, "unreadable", f"cannot be read: {found.strerror or found}"
                        )
                    )
                    keys.append("")
                else:
                    keys.append(latent_key(found, one, options, fingerprint))
                stage.advance()
    return keys, bad


def _encode_images(
    store: TensorStore,
    jobs: Sequence[EncodeJob],
    options: DataOptions,
    encoder: Callable[[], EncodeImages],
    pool: ThreadPoolExecutor,
    emit: Emit,
    batch_size: int,
) -> dict[str, tuple[str, str]]:
    """Key -> (reason, detail) of what could not be encoded."""
    failed: dict[str, tuple[str, str]] = {}
    encode: EncodeImages | None = None
    with StageReporter(emit, "encode images", len(jobs), "images") as stage, store.flush_on_exit():
        for batch in _decode_ahead(_iter_bucket_batches(jobs, batch_size), options, pool):
            good = []
            for (key, _), pixels in batch:
                if isinstance(pixels, UnusableFile):
                    failed[key] = (pixels.reason, str(pixels))
                else:
                    good.append((key, pixels))
            if good:
                encode = encode or encoder()
                stacked = torch.from_numpy(np.stack([pixels for _, pixels in good]))
                moments = encode(stacked.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0)
                for (key, _), one in zip(good, moments, strict=True):
                    if bool(torch.isfinite(one).all()):
                        store.put(key, {"moments": one})
                    else:
                        failed[key] = (
                            "nonfinite_latent",
                            "its latent is not finite; try vae_dtype = fp32",
                        )
            stage.advance(len(batch))
        stage.summary = f"{len(failed)} could not be encoded" if failed else ""
    return failed


def _iter_bucket_batches(jobs: Sequence[EncodeJob], batch_size: int) -> Iterator[list[EncodeJob]]:
    buckets: dict[tuple[int, int], list[EncodeJob]] = {}
    for job in jobs:
        buckets.setdefault(job[1].bucket_px, []).append(job)
    for bucket in sorted(buckets):
        for start in range(0, len(buckets[bucket]), batch_size):
            yield buckets[bucket][start : start + batch_size]


def _decode_ahead(
    batches: Iterator[list[EncodeJob]], options: DataOptions, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[EncodeJob, np.ndarray | UnusableFile]]]:
    """Pixels of each batch, with the next two batches already being decoded."""

    def pixels(job: EncodeJob) -> np.ndarray | UnusableFile:
        try:
            return load_pixels(job[1], options)
        except UnusableFile as error:
            return error

    ahead: deque[list[tuple[EncodeJob, Future[np.ndarray | UnusableFile]]]] = deque()
    for batch in batches:
        ahead.append([(job, pool.submit(pixels, job)) for job in batch])
        if len(ahead) > 2:
            yield [(job, future.result()) for job, future in ahead.popleft()]
    while ahead:
        yield [(job, future.result()) for job, future in ahead.popleft()]


def _make_rejected(placed: BucketedSample, reason: str, detail: str) -> RejectedFile:
    return RejectedFile(str(placed.sample.path), placed.sample.dataset, reason, detail)
