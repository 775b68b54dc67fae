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

from simpletuner.cache import latents as latent_cache
from simpletuner.cache import text as text_cache
from simpletuner.cache.batches import Batches
from simpletuner.cache.content import ContentHashes
from simpletuner.cache.latents import Filled
from simpletuner.cache.store import Store
from simpletuner.config.schema import ModelOptions, RunConfig
from simpletuner.data.backends import Backends, Dataset
from simpletuner.data.report import listing, write_rejected
from simpletuner.data.scan import scan
from simpletuner.data.types import Placed
from simpletuner.errors import DataError
from simpletuner.events.types import Emit, Noted, Warned
from simpletuner.models.family import Facts, ModelFamily, Source, TextEncoder
from simpletuner.training.device import Device
from simpletuner.training.rundir import RunFolder

LISTED = 20


@dataclass(frozen=True)
class Prepared:
    """Inputs of a run, all on disk. train, eval: samples whose latents are in the cache, with their keys."""

    family: ModelFamily
    source: Source
    facts: Facts
    train_sets: tuple[Dataset, ...]
    train: Filled
    eval: Filled
    latents: Store
    text: Store

    def rows(self, caption: str) -> Tensor:
        """Text rows (L, D) of a caption that was prepared."""
        return text_cache.rows_of(self.text, caption)

    def batches(self, filled: Filled, sample: Literal["mean", "draw"], seed: int) -> Batches:
        stored, scaling = (self.latents, self.text), (self.facts.latent_shift, self.facts.latent_scale)
        return Batches(filled.placed, filled.keys, *stored, *scaling, sample, seed)

    def decoder(self, options: ModelOptions, at: torch.device) -> Callable[[], Callable[[Tensor], Tensor]]:
        """Makes the function from latents to pixels; the VAE behind it lives as long as that."""
        return lambda: self.family.load_vae(self.source, options, at).decode

    def name(self) -> str:
        """16 hex digits for the whole identity."""
        return hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()[:16]

    def identity(self) -> dict[str, str]:
        """What must be the same for a resumed run to be the same run."""
        digest = hashlib.sha256()
        for one in self.train_sets:
            digest.update(f"{one.id}|{one.repeats}|{one.probability}\n".encode("utf-8", "surrogateescape"))
        for item in self.train.placed:
            line = f"{item.sample.id}|{item.bucket_px}|{item.crop_px}|{item.sample.captions}"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return {
            "base weights": f"{self.source.name} {self.family.transformer_fingerprint(self.source)}"[:120],
            "text encoder": self.text.fingerprint,
            "VAE": self.latents.fingerprint,
            "pictures and captions": f"{len(self.train.placed)} samples, {digest.hexdigest()[:16]}",
        }


def prepare(
    run: RunConfig, backends: Backends, family: ModelFamily, texts: Sequence[str], folder: RunFolder,
    device: Device, emit: Emit, closing: ExitStack,
) -> Prepared:  # fmt: skip
    """texts: what else must be encoded besides the captions. closing: gets the caches."""
    listed = folder.path / "rejected.jsonl"
    scanned = scan([*backends.train, *backends.eval], run.data, run.training.seed, emit, rejected_path=listed)
    if scanned.rejected:
        emit(Warned(f"not trained on ({len(scanned.rejected)}):\n{listing(scanned.rejected, listed)}"))
    held_out = {one.id for one in backends.eval}
    source = family.locate(run.model, emit)
    facts = family.facts(source)
    root = Path(run.cache.cache_dir) if run.cache.cache_dir else folder.path / "cache"
    text_fingerprint = family.text_fingerprint(source, run.model)
    vae_fingerprint = family.vae_fingerprint(source, run.model)
    shard_mib = run.cache.cache_shard_mib
    text = closing.enter_context(
        Store(backends.text_cache_dir or root / "text", text_fingerprint, emit, shard_mib)
    )
    latents = closing.enter_context(Store(root / "vae", vae_fingerprint, emit, shard_mib))

    captions = sorted({"", *texts, *(caption for item in scanned.placed for caption in item.sample.captions)})

    def text_encoder() -> Callable[[Sequence[str]], list[Tensor]]:
        encoder = family.load_text_encoder(source, run.model, device.device, emit)
        report_overlong(encoder, captions, facts.max_tokens, run.model, emit)
        return encoder.encode

    text_cache.fill(text, captions, text_encoder, emit, run.cache.text_encoder_batch_size)
    free(device)

    @cache
    def vae_encoder() -> Callable[[Tensor], Tensor]:
        return family.load_vae(source, run.model, device.device).encode

    hashes = ContentHashes(root, emit)
    filled = latent_cache.fill(
        latents, scanned.placed, run.data, hashes, vae_encoder, emit, run.cache.vae_batch_size
    )
    hashes.close()
    vae_encoder.cache_clear()
    free(device)
    if filled.rejected:
        rejected = [*scanned.rejected, *filled.rejected]
        write_rejected(listed, rejected)
        emit(Warned(f"{len(filled.rejected)} more cannot be decoded:\n{listing(filled.rejected, listed)}"))
    train = part(filled, lambda item: item.sample.dataset not in held_out)
    evaluated = part(filled, lambda item: item.sample.dataset in held_out)
    return Prepared(family, source, facts, backends.train, train, evaluated, latents, text)


def part(filled: Filled, wanted: Callable[[Placed], bool]) -> Filled:
    """The samples of a kind, with their keys."""
    pairs = [pair for pair in zip(filled.placed, filled.keys, strict=True) if wanted(pair[0])]
    return Filled(tuple(one for one, _ in pairs), tuple(key for _, key in pairs), ())


def free(device: Device) -> None:
    """Give back what the encoder used before the next model comes."""
    gc.collect()
    device.hardware.empty_cache()


def report_overlong(
    encoder: TextEncoder, captions: Sequence[str], limit: int, options: ModelOptions, emit: Emit
) -> None:
    """Captions above the token limit are counted and listed, never cut in silence."""
    counts = [(encoder.token_count(caption), caption) for caption in captions]
    overlong = sorted(((count, caption) for count, caption in counts if count > limit), reverse=True)
    if not overlong:
        emit(Noted(f"longest caption: {max(counts)[0]} of {limit} tokens"))
        return
    worst = "".join(f"\n  {count} tokens: {caption[:80]!r}..." for count, caption in overlong[:LISTED])
    message = f"{len(overlong)} captions are longer than {limit} tokens:{worst}"
    if options.caption_overlong == "error":
        raise DataError(f"{message}\nShorten them, or set caption_overlong = truncate")
    emit(Warned(f"{message}\nTheir ends are not seen by the model (caption_overlong = truncate)"))
