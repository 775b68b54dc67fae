"""The mask cache: the mask of each image on its latent grid, in the store of the latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from simpletuner.cache.content_hashes import ContentHashes
from simpletuner.cache.latent_cache import LatentCacheResult, check_rejected_images
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.config.schema import DataOptions
from simpletuner.data.masks import load_mask
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sample_types import BucketedSample, RejectedFile
from simpletuner.events.event_types import Emit
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.peers import ALONE, Peers

MASKS_VERSION = 1  # increase it when the same file and geometry give other levels than before
LOADER_THREADS = 4


def mask_key(content: str, placed: BucketedSample, fingerprint: str, stride_px: int) -> str:
    """Hash everything that determines the levels: content, channel, geometry and latent grid."""
    assert placed.sample.mask is not None
    geometry = (placed.resize_px, placed.crop_px, placed.bucket_px, stride_px)
    parts = ("mask", MASKS_VERSION, content, placed.sample.mask.channel, geometry, fingerprint)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cache_missing_masks(
    store: TensorStore,
    cached: LatentCacheResult,
    stride_px: int,
    options: DataOptions,
    hashes: ContentHashes | None,
    emit: Emit,
    peers: Peers = ALONE,
) -> LatentCacheResult:
    """Return the samples with the keys of their masks, without those whose mask is unusable.

    hashes: None on all but the main process, which computes the keys. Several processes share out
    the masks; afterwards the store of each has all of them. Raises DataError when more images than
    options.max_bad_sample_fraction are unusable.
    """
    masked = {
        index: placed
        for index, placed in enumerate(cached.placed_samples)
        if placed.sample.mask is not None
    }
    if not masked:
        return cached
    keys, failed, missing = _find_missing(store, masked, stride_px, hashes, peers)
    jobs = {key: masked[index] for index, key in keys.items() if key in set(missing)}
    own = [job for _, job in peers.share(list(jobs.items()))]
    errors = _load_masks(store, own, stride_px, emit)
    if jobs:
        errors = {key: why for part in peers.gather_json(errors) for key, why in part.items()}
        store.adopt_new_shards()
    failed |= {index: errors[key] for index, key in keys.items() if key in errors}
    return _without_failed(cached, keys, failed, options.max_bad_sample_fraction)


def _without_failed(
    cached: LatentCacheResult,
    keys: Mapping[int, str],
    failed: Mapping[int, Sequence[str]],
    max_bad_fraction: float,
) -> LatentCacheResult:
    """Return the samples with their keys; an image of which one crop's mask fails is not used.

    keys, failed: by the index of the sample.
    """
    samples = cached.placed_samples
    bad = {
        samples[index].sample.id: RejectedFile(
            samples[index].sample.file.address, samples[index].sample.dataset, *why
        )
        for index, why in sorted(failed.items())
    }
    rejected = (*cached.rejected, *bad.values())
    images = sum(item.crop_index == 0 for item in samples) + len(cached.rejected)
    check_rejected_images(rejected, images, max_bad_fraction)
    usable = [index for index, item in enumerate(samples) if item.sample.id not in bad]
    return LatentCacheResult(
        tuple(samples[index] for index in usable),
        tuple(cached.latent_keys[index] for index in usable),
        tuple(keys.get(index, "") for index in usable),
        rejected,
    )


def _find_missing(
    store: TensorStore,
    masked: dict[int, BucketedSample],
    stride_px: int,
    hashes: ContentHashes | None,
    peers: Peers,
) -> tuple[dict[int, str], dict[int, list[str]], list[str]]:
    """Return the keys by index, (reason, detail) of unreadable files, and the missing keys."""
    survey: tuple[list[list[object]], list[list[object]], list[str]] | None = None
    if hashes is not None:
        keys: list[list[object]] = []
        unreadable: list[list[object]] = []
        for index, placed in masked.items():
            mask = placed.sample.mask
            assert mask is not None
            try:
                content = hashes.hash_file(mask.file or placed.sample.file)
            except OSError as error:
                detail = f"its mask cannot be read: {error.strerror or error}"
                unreadable.append([index, ["mask_unreadable", detail]])
                continue
            keys.append([index, mask_key(content, placed, store.fingerprint, stride_px)])
        survey = keys, unreadable, store.missing_keys(str(key) for _, key in keys)
    pairs, failures, missing = peers.broadcast_json(survey)
    return dict(pairs), dict(failures), missing


def _load_masks(
    store: TensorStore, jobs: Sequence[tuple[str, BucketedSample]], stride_px: int, emit: Emit
) -> dict[str, list[str]]:
    """Decode and store masks; return key -> (reason, detail) of those that cannot be used."""
    failed: dict[str, list[str]] = {}
    if not jobs:
        return failed

    def load(job: tuple[str, BucketedSample]) -> torch.Tensor | UnusableFile:
        try:
            return torch.from_numpy(load_mask(job[1], stride_px))
        except UnusableFile as error:
            return error

    with (
        StageReporter(emit, "read masks", len(jobs), "masks") as stage,
        store.flush_on_exit(),
        ThreadPoolExecutor(LOADER_THREADS, "masks") as pool,
    ):
        for start in range(0, len(jobs), 1000):  # in parts: map() submits all its jobs at once
            part = jobs[start : start + 1000]
            for (key, _), levels in zip(part, pool.map(load, part), strict=True):
                if isinstance(levels, UnusableFile):
                    failed[key] = [levels.reason, str(levels)]
                else:
                    store.put(key, {"mask": levels})
                stage.advance()
    return failed
