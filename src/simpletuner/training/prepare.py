"""Before the network: find weights, scan pictures, fill the caches. A warm start loads no encoder."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from simpletuner.cache import latent_cache as latent_cache
from simpletuner.cache import text_cache as text_cache
from simpletuner.cache.batch_loader import BatchLoader
from simpletuner.cache.content_hashes import ContentHashes
from simpletuner.cache.latent_cache import LatentCacheResult
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.config.schema import ModelOptions, RunConfig
from simpletuner.data.dataset_config import DatasetConfig, DatasetFile
from simpletuner.data.rejections import format_rejected, write_rejected
from simpletuner.data.sample_types import BucketedSample
from simpletuner.data.scan import scan_datasets
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit, NoticeIssued, WarningIssued
from simpletuner.models.family import ArchitectureConstants, ModelFamily, ModelFiles, TextEncoder
from simpletuner.training.device import ComputeDevice
from simpletuner.training.run_folder import RunFolder

MAX_LISTED_CAPTIONS = 20


@dataclass(frozen=True)
class PreparedInputs:
    """Inputs of a run, all on disk. train, eval: samples whose latents are in the cache, with their keys."""

    family: ModelFamily
    model_files: ModelFiles
    constants: ArchitectureConstants
    train_sets: tuple[DatasetConfig, ...]
    train: LatentCacheResult
    eval: LatentCacheResult
    latent_cache: TensorStore
    text_cache: TensorStore

    def text_embedding(self, caption: str) -> Tensor:
        """Text rows (L, D) of a caption that was prepared."""
        return text_cache.load_text_embeddings(self.text_cache, caption)

    def make_batches(
        self, filled: LatentCacheResult, sample: Literal["mean", "draw"], seed: int
    ) -> BatchLoader:
        stored, scaling = (
            (self.latent_cache, self.text_cache),
            (self.constants.latent_shift, self.constants.latent_scale),
        )
        return BatchLoader(
            filled.placed_samples, filled.latent_keys, *stored, *scaling, sample, seed
        )

    def decoder_loader(
        self, options: ModelOptions, at: torch.device
    ) -> Callable[[], Callable[[Tensor], Tensor]]:
        """Makes the function from latents to pixels; the VAE behind it lives as long as that."""
        return lambda: self.family.load_vae(self.model_files, options, at).decode

    def identity_hash(self) -> str:
        """16 hex digits for the whole identity."""
        return hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()[:16]

    def identity(self) -> dict[str, str]:
        """What must be the same for a resumed run to be the same run."""
        digest = hashlib.sha256()
        for one in self.train_sets:
            digest.update(
                f"{one.id}|{one.repeats}|{one.probability}\n".encode("utf-8", "surrogateescape")
            )
        for item in self.train.placed_samples:
            line = f"{item.sample.id}|{item.bucket_px}|{item.crop_px}|{item.sample.captions}"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return {
            "base weights": f"{self.model_files.name} {self.family.transformer_fingerprint(self.model_files)}"[
                :120
            ],
            "text encoder": self.text_cache.fingerprint,
            "VAE": self.latent_cache.fingerprint,
            "pictures and captions": f"{len(self.train.placed_samples)} samples, {digest.hexdigest()[:16]}",
        }


def prepare_inputs(
    run: RunConfig,
    backends: DatasetFile,
    family: ModelFamily,
    texts: Sequence[str],
    folder: RunFolder,
    device: ComputeDevice,
    emit: Emit,
    closing: ExitStack,
) -> PreparedInputs:
    """texts: what else must be encoded besides the captions. closing: gets the caches."""
    listed = folder.path / "rejected.jsonl"
    scanned = scan_datasets(
        [*backends.train, *backends.eval], run.data, run.training.seed, emit, rejected_path=listed
    )
    if scanned.rejected:
        emit(
            WarningIssued(
                f"not trained on ({len(scanned.rejected)}):\n{format_rejected(scanned.rejected, listed)}"
            )
        )
    held_out = {one.id for one in backends.eval}
    source = family.locate_files(run.model, emit)
    facts = family.read_constants(source)
    root = Path(run.cache.cache_dir) if run.cache.cache_dir else folder.path / "cache"
    text_fingerprint = family.text_fingerprint(source, run.model)
    vae_fingerprint = family.vae_fingerprint(source, run.model)
    shard_mib = run.cache.cache_shard_mib
    text = closing.enter_context(
        TensorStore(backends.text_cache_dir or root / "text", text_fingerprint, emit, shard_mib)
    )
    latents = closing.enter_context(TensorStore(root / "vae", vae_fingerprint, emit, shard_mib))

    captions = sorted(
        {"", *texts, *(caption for item in scanned.samples for caption in item.sample.captions)}
    )

    def text_encoder() -> Callable[[Sequence[str]], list[Tensor]]:
        encoder = family.load_text_encoder(source, run.model, device.device, emit)
        report_overlong_captions(encoder, captions, facts.max_tokens, run.model, emit)
        return encoder.encode

    text_cache.encode_missing_captions(
        text, captions, text_encoder, emit, run.cache.text_encoder_batch_size
    )
    free_memory(device)

    @cache
    def vae_encoder() -> Callable[[Tensor], Tensor]:
        return family.load_vae(source, run.model, device.device).encode

    hashes = ContentHashes(root, emit)
    filled = latent_cache.encode_missing_latents(
        latents, scanned.samples, run.data, hashes, vae_encoder, emit, run.cache.vae_batch_size
    )
    hashes.close()
    vae_encoder.cache_clear()
    free_memory(device)
    if filled.rejected:
        rejected = [*scanned.rejected, *filled.rejected]
        write_rejected(listed, rejected)
        emit(
            WarningIssued(
                f"{len(filled.rejected)} more cannot be decoded:\n{format_rejected(filled.rejected, listed)}"
            )
        )
    train = select_samples(filled, lambda item: item.sample.dataset not in held_out)
    evaluated = select_samples(filled, lambda item: item.sample.dataset in held_out)
    return PreparedInputs(family, source, facts, backends.train, train, evaluated, latents, text)


def select_samples(
    filled: LatentCacheResult, wanted: Callable[[BucketedSample], bool]
) -> LatentCacheResult:
    """The samples of a kind, with their keys."""
    pairs = [
        pair
        for pair in zip(filled.placed_samples, filled.latent_keys, strict=True)
        if wanted(pair[0])
    ]
    return LatentCacheResult(tuple(one for one, _ in pairs), tuple(key for _, key in pairs), ())


def free_memory(device: ComputeDevice) -> None:
    """Give back what the encoder used before the next model comes."""
    gc.collect()
    device.hardware.empty_cache()


def report_overlong_captions(
    encoder: TextEncoder, captions: Sequence[str], limit: int, options: ModelOptions, emit: Emit
) -> None:
    """Captions above the token limit are counted and listed, never cut in silence."""
    counts = [(encoder.token_count(caption), caption) for caption in captions]
    overlong = sorted(
        ((count, caption) for count, caption in counts if count > limit), reverse=True
    )
    if not overlong:
        emit(NoticeIssued(f"longest caption: {max(counts)[0]} of {limit} tokens"))
        return
    worst = "".join(
        f"\n  {count} tokens: {caption[:80]!r}..."
        for count, caption in overlong[:MAX_LISTED_CAPTIONS]
    )
    message = f"{len(overlong)} captions are longer than {limit} tokens:{worst}"
    if options.caption_overlong == "error":
        raise DataError(f"{message}\nShorten them, or set caption_overlong = truncate")
    emit(
        WarningIssued(
            f"{message}\nTheir ends are not seen by the model (caption_overlong = truncate)"
        )
    )
