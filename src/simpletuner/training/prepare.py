"""Prepare the inputs of a run: find the model files, scan the images, fill the caches.

When everything is cached already, no encoder is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from simpletuner.cache import latent_cache as latent_cache
from simpletuner.cache import text_cache as text_cache
from simpletuner.cache.batch_loader import BatchLoader
from simpletuner.cache.batch_types import TextEmbedding
from simpletuner.cache.content_hashes import ContentHashes
from simpletuner.cache.latent_cache import LatentCacheResult
from simpletuner.cache.mask_cache import cache_missing_masks
from simpletuner.cache.remote_shards import RemoteShards
from simpletuner.cache.target_rules import TargetRules
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.config.schema import ModelOptions, RunConfig
from simpletuner.data.dataset_config import DatasetConfig, DatasetFile
from simpletuner.data.rejections import format_rejected, write_rejected
from simpletuner.data.remote_store import open_remote_store
from simpletuner.data.sample_types import BucketedSample
from simpletuner.data.scan import ScanResult
from simpletuner.events.event_types import Emit, WarningIssued
from simpletuner.models.family import ArchitectureConstants, ModelFamily, ModelFiles
from simpletuner.training.base_targets import target_rules
from simpletuner.training.caption_encoding import (
    captions_to_encode,
    encode_captions,
    free_memory,
)
from simpletuner.training.device import ComputeDevice, split_when_out_of_memory
from simpletuner.training.hold_out import (
    choose_held_out_ids,
    require_held_out_images,
    taught_samples,
)
from simpletuner.training.resume import ResumePoint
from simpletuner.training.run_folder import RunFolder
from simpletuner.training.shared_scan import scan_everywhere
from simpletuner.training.world import World

MAX_NAMED_SAMPLES = 20_000


@dataclass(frozen=True)
class PreparedInputs:
    """The inputs of a run, all on disk.

    train, eval: the samples whose latents are cached, with their keys. held_out: ids of the samples
    of training datasets that are in eval. rules: what the training samples are trained towards.
    """

    family: ModelFamily
    model_files: ModelFiles
    constants: ArchitectureConstants
    train_sets: tuple[DatasetConfig, ...]
    train: LatentCacheResult
    eval: LatentCacheResult
    latent_cache: TensorStore
    text_cache: TensorStore
    rules: TargetRules
    held_out: frozenset[str] = frozenset()

    def taught(self) -> LatentCacheResult:
        """Return the first crops of the training images that are not regularisation."""
        regularisation = self.rules.regularisation
        return select_samples(
            self.train,
            lambda item: item.sample.dataset not in regularisation and item.crop_index == 0,
        )

    def text_embedding(self, caption: str) -> TextEmbedding:
        """Return the text embedding of a caption that is in the cache."""
        return text_cache.load_text_embedding(self.text_cache, caption)

    def make_batches(
        self, cached: LatentCacheResult, sample: Literal["mean", "draw"], seed: int
    ) -> BatchLoader:
        return BatchLoader(
            placed_samples=cached.placed_samples,
            latent_keys=cached.latent_keys,
            latent_store=self.latent_cache,
            text_store=self.text_cache,
            latent_shift=self.constants.latent_shift,
            latent_scale=self.constants.latent_scale,
            posterior_mode=sample,
            seed=seed,
            latent_channels=self.constants.latent_channels,
        )

    def make_train_batches(self, sample: Literal["mean", "draw"], seed: int) -> BatchLoader:
        """Return the loader of the training, with masks and the targets of the samples."""
        batches = self.make_batches(self.train, sample, seed)
        return replace(batches, mask_keys=self.train.mask_keys, rules=self.rules)

    def decoder_loader(
        self, options: ModelOptions, device: torch.device
    ) -> Callable[[], Callable[[Tensor], Tensor]]:
        """Return a function that loads the VAE and returns its decoder, latents to pixels."""
        return lambda: self.family.load_vae(self.model_files, options, device).decode

    def identity_hash(self) -> str:
        """Return 16 hex digits for the whole identity."""
        return hashlib.sha256(json.dumps(self.older_identity()).encode()).hexdigest()[:16]

    def identity(self) -> dict[str, str]:
        """Return what must not change when a run is resumed: base weights, encoders and data.

        The keys are stored in checkpoints and shown to users. An image counts by its id, content,
        size and crop: its key in the latent cache is a hash of them. So does its mask.
        """
        identity = {
            "base weights": self._base_weights(),
            "text encoder": self.text_cache.fingerprint,
            "VAE": self.latent_cache.fingerprint,
            "datasets": ", ".join(dataset.id for dataset in self.train_sets),
        }
        by_dataset: dict[str, list[tuple[BucketedSample, str]]] = defaultdict(list)
        for item, key in zip(self.train.placed_samples, self._image_keys(), strict=True):
            by_dataset[item.sample.dataset].append((item, key))
        for dataset in self.train_sets:
            images, captions = hashlib.sha256(), hashlib.sha256()
            count = sum(item.crop_index == 0 for item, _ in by_dataset[dataset.id])
            for item, key in by_dataset[dataset.id]:
                name = item.sample.id.encode("utf-8", "surrogateescape")
                images.update(name + f"|{key}|{item.crop_px}\n".encode())
                weight = "" if item.sample.weight == 1 else f"|{item.sample.weight:g}"
                captions.update(name + f"|{json.dumps(item.sample.captions)}{weight}\n".encode())
            identity[f"dataset {dataset.id}"] = (
                f"{count} samples, images {images.hexdigest()[:12]}, "
                f"captions {captions.hexdigest()[:12]}, repeats {dataset.repeats}, "
                f"probability {dataset.probability:g}{_describe_variation(dataset)}"
            )
        return identity

    def _image_keys(self) -> list[str]:
        """Return one key for each training sample: of its image, and of its mask if it has one."""
        pairs = zip(self.train.latent_keys, self.train.mask_keys, strict=True)
        # Without a mask the key is that of the image alone, as in checkpoints from before masks.
        return [_short_hash(image + mask) + image if mask else image for image, mask in pairs]

    def sample_hashes(self) -> dict[str, str]:
        """Return sample id -> hashes of image and captions, to name those that have changed.

        Empty above MAX_NAMED_SAMPLES, where the table would be larger than a small LoRA.
        """
        if len(self.train.placed_samples) > MAX_NAMED_SAMPLES:
            return {}
        return {
            item.sample.id: f"{key[:8]} {_short_hash(json.dumps(item.sample.captions))}"
            for item, key in zip(self.train.placed_samples, self._image_keys(), strict=True)
        }

    def encoded_now(self) -> dict[str, int]:
        """Return option of a batch size -> how many entries this process has encoded with it."""
        return {
            "text_encoder_batch_size": self.text_cache.put_count,
            "vae_batch_size": self.latent_cache.put_count,
        }

    def _base_weights(self) -> str:
        return f"{self.model_files.name} {self.family.transformer_fingerprint(self.model_files)}"

    def older_identity(self) -> dict[str, str]:
        """Return the identity as checkpoints of earlier versions store it.

        It does not see the content of an image, and cuts a long name of the base off.
        """
        digest = hashlib.sha256()
        for dataset in self.train_sets:
            line = f"{dataset.id}|{dataset.repeats}|{dataset.probability}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        for item in self.train.placed_samples:
            # The text of earlier versions: another one would refuse every checkpoint of theirs.
            line = f"{item.sample.id}|{item.bucket_px}|{item.crop_px}|{item.sample.captions}"
            digest.update(line.encode("utf-8", "surrogateescape"))
        sample_count = len(self.train.placed_samples)
        return {
            "base weights": self._base_weights()[:120],
            "text encoder": self.text_cache.fingerprint,
            "VAE": self.latent_cache.fingerprint,
            "pictures and captions": f"{sample_count} samples, {digest.hexdigest()[:16]}",
        }


def _describe_variation(dataset: DatasetConfig) -> str:
    """Return the fields that decide when and how a sample is used; "" where all have no effect."""
    # Usual values are left out: a dataset without these fields is described as it always was.
    plain = DatasetConfig("", "", Path())
    fields = {
        "weights": (dataset.caption_weights, plain.caption_weights),
        "batch size": (dataset.resize_crop.train_batch_size, None),
        "timestep offset": (dataset.timestep_sampling_offset, plain.timestep_sampling_offset),
        "active": (dataset.active, plain.active),
        "regularisation towards": (dataset.regularisation_target, plain.regularisation_target),
    }
    changed = [f", {name} {value}" for name, (value, usual) in fields.items() if value != usual]
    return "".join(changed)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def prepare_inputs(
    run: RunConfig,
    backends: DatasetFile,
    family: ModelFamily,
    texts: Sequence[str],
    folder: RunFolder,
    device: ComputeDevice,
    world: World,
    emit: Emit,
    closing: ExitStack,
    resume_point: ResumePoint | None = None,
) -> PreparedInputs:
    """Scan the datasets, encode what is not cached yet, and hold images out.

    texts: what must be encoded in addition to the captions. closing: receives the caches. Every
    process scans the datasets; DataError where they do not see the same.
    """
    # Every process finds the same files; one writes the list.
    rejected_path = folder.path / "rejected.jsonl" if world.is_main else None
    root = Path(run.cache.cache_dir) if run.cache.cache_dir else folder.path / "cache"
    remote_store = open_remote_store(
        [*backends.train, *backends.eval], run.cache, root, emit, closing
    )
    scanned = scan_everywhere(
        run, backends, family.alignment_px, rejected_path, remote_store, world, emit
    )
    if resume_point is None:
        require_held_out_images(run, backends, scanned.samples)
    with world.main_first("model files"):  # rank 0 downloads what is missing
        files = family.locate_files(run.model, emit)
    constants = family.read_constants(files)
    fingerprints = {
        backends.text_cache_dir or root / "text": family.text_fingerprint(files, run.model),
        root / "vae": family.vae_fingerprint(files, run.model),
    }
    text_store, latent_store = open_stores(run, fingerprints, world, emit, closing)
    rules = target_rules(run, backends)
    captions = captions_to_encode(scanned, texts, rules)
    encode_captions(
        run, family, files, constants.max_tokens, text_store, captions, device, world, emit
    )
    inputs = latent_store, constants.stride_px, scanned, root, rejected_path
    cached = encode_images(run, family, files, *inputs, device, world, emit)
    if remote_store is not None:
        remote_store.keep_failures()
    train, evaluated, split = divide_samples(run, backends, cached, root, resume_point, world, emit)
    return PreparedInputs(
        family,
        files,
        constants,
        backends.train,
        train,
        evaluated,
        latent_store,
        text_store,
        rules,
        split,
    )


def open_stores(
    run: RunConfig, fingerprints: Mapping[Path, str], world: World, emit: Emit, closing: ExitStack
) -> list[TensorStore]:
    """Open a cache in each folder. fingerprints: of the encoders whose results they hold."""
    shard_mib = run.cache.cache_shard_mib
    address = run.cache.cache_remote
    with world.main_first("cache"):  # it repairs what a killed process has left
        return [
            closing.enter_context(
                TensorStore(
                    path,
                    fingerprint,
                    emit,
                    shard_mib,
                    shares_index=world.is_main,
                    remote=RemoteShards(address, fingerprint, emit) if address else None,
                )
            )
            for path, fingerprint in fingerprints.items()
        ]


def divide_samples(
    run: RunConfig,
    backends: DatasetFile,
    cached: LatentCacheResult,
    cache_root: Path,
    resume_point: ResumePoint | None,
    world: World,
    emit: Emit,
) -> tuple[LatentCacheResult, LatentCacheResult, frozenset[str]]:
    """Return the samples to train on, those that are held out, and which of these were split off.

    Held out are the eval datasets, and the part of the training datasets that validation_split
    sets aside, which takes nothing from regularisation datasets.
    """
    eval_sets = {dataset.id for dataset in backends.eval}
    candidates = taught_samples(backends, cached.placed_samples)
    split = choose_held_out_ids(
        run, candidates, bool(eval_sets), cache_root, resume_point, world, emit
    )

    def is_held_out(item: BucketedSample) -> bool:
        return item.sample.dataset in eval_sets or item.sample.id in split

    train = select_samples(cached, lambda item: not is_held_out(item))
    held_out = select_samples(cached, lambda item: is_held_out(item) and item.crop_index == 0)
    return train, held_out, split


def encode_images(
    run: RunConfig,
    family: ModelFamily,
    files: ModelFiles,
    store: TensorStore,
    stride_px: int,
    scanned: ScanResult,
    cache_root: Path,
    rejected_path: Path | None,
    device: ComputeDevice,
    world: World,
    emit: Emit,
) -> LatentCacheResult:
    """Encode the images that are not cached, and read their masks.

    The VAE is loaded only if there are any. stride_px: of its latents.
    """

    @cache
    def load_encoder() -> Callable[[Tensor], Tensor]:
        encode = family.load_vae(files, run.model, device.device).encode
        return split_when_out_of_memory(encode, device.hardware)

    # One process hashes the files; the keys are sent to the others.
    hashes = ContentHashes(cache_root, emit) if world.is_main else None
    count = run.cache.vae_batch_size
    cached = latent_cache.encode_missing_latents(
        store, scanned.samples, run.data, hashes, load_encoder, emit, count, world
    )
    cached = cache_missing_masks(store, cached, stride_px, run.data, hashes, emit, world)
    if hashes is not None:
        hashes.close()
    if load_encoder.cache_info().currsize:
        load_encoder.cache_clear()
        free_memory(device)
    if cached.rejected and rejected_path is not None:
        write_rejected(rejected_path, [*scanned.rejected, *cached.rejected])
        listed = format_rejected(cached.rejected, rejected_path)
        emit(WarningIssued(f"{len(cached.rejected)} more cannot be decoded:\n{listed}"))
    return cached


def select_samples(
    cached: LatentCacheResult, is_wanted: Callable[[BucketedSample], bool]
) -> LatentCacheResult:
    """Return the samples for which is_wanted is true, with their keys."""
    rows = zip(cached.placed_samples, cached.latent_keys, cached.mask_keys, strict=True)
    chosen = [row for row in rows if is_wanted(row[0])]
    return LatentCacheResult(
        tuple(sample for sample, _, _ in chosen),
        tuple(key for _, key, _ in chosen),
        tuple(mask for _, _, mask in chosen),
        (),
    )
