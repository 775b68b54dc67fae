"""Measure text encoder and VAE on tensors without data, each at its largest batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from simpletuner.cache.latent_cache import ENCODER_PIXELS
from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import ImageSize
from simpletuner.models.encoders import EncoderPass
from simpletuner.models.family import ModelFamily, ModelSpec
from simpletuner.training.memory_plan import plan_cache
from simpletuner.training.memory_plan.fake_step import BatchShape, materialise_parameters
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from simpletuner.validation.prompts import parse_sizes

# Bytes of both: the encoders of the bundled model are smaller than what importing them needs.
SMALL_ENCODERS = 100_000_000
# Model options that only the transformer's training reads: no encoder is measured again for them.
TRANSFORMER_OPTIONS = frozenset(
    {
        "model_type",
        "base_model_precision",
        "gradient_checkpointing",
        "gradient_checkpointing_interval",
        "gradient_checkpointing_backend",
        "musubi_blocks_to_swap",
        "chroma_approximator_device",
        "dynamo_backend",
        "dynamo_mode",
    }
)


@dataclass(frozen=True)
class EncoderMemory:
    """Device bytes of each use, weights included.

    text_encoder, vae_encoding: of the largest batches. vae_decoding: of one image.
    """

    text_encoder: int
    vae_encoding: int
    vae_decoding: int

    @property
    def before_training(self) -> dict[str, int]:
        """Return the uses whose model is dropped before the training."""
        return {"text encoder": self.text_encoder, "VAE": self.vae_encoding}

    def between_steps(self, held: int, approximator: int) -> dict[str, int]:
        """Return the uses between steps, in addition to the `held` bytes of the training.

        approximator: bytes that are on the device only meanwhile; 0 where they stay.
        """
        modulations = {"modulations": held + approximator} if approximator else {}
        return {"VAE decoding": held + self.vae_decoding, **modulations}


def measure_encoders(
    run: RunConfig, family: ModelFamily, spec: ModelSpec, feed: BatchShape, kind: str, granule: int
) -> EncoderMemory:
    """Return the memory of the encoders, from the cache of plans where it is there.

    Of small ones, and of a family that does not describe them, only the weights are counted.
    """
    if spec.text_encoder_bytes + spec.vae_bytes < SMALL_ENCODERS:
        return EncoderMemory(spec.text_encoder_bytes, spec.vae_bytes, spec.vae_bytes)
    model, captions = run.model, run.cache.text_encoder_batch_size
    fitting = max(1, ENCODER_PIXELS // (feed.size_px[0] * feed.size_px[1]))
    images = min(run.cache.vae_batch_size, fitting)
    decoded = largest_validation_size(run, spec)

    def measured(weights: int, make: Callable[[], EncoderPass | None], *key: object) -> int:
        options = model.model_dump(mode="json", exclude=set(TRANSFORMER_OPTIONS))
        parts = [kind, granule, options, torch.__version__, *key]
        name = plan_cache.digest("encoder", json.dumps(parts, sort_keys=True, default=str))
        return plan_cache.get_or_count(name, lambda: peak_bytes(make(), granule, weights))

    return EncoderMemory(
        measured(
            spec.text_encoder_bytes,
            lambda: family.text_encoder_pass(model, captions, feed.text_rows),
            "text encoder", captions, feed.text_rows,
        ),
        measured(
            spec.vae_bytes,
            lambda: family.vae_pass(model, kind, images, feed.size_px, decodes=False),
            "VAE encoding", images, feed.size_px,
        ),
        measured(
            spec.vae_bytes,
            lambda: family.vae_pass(model, kind, 1, decoded, decodes=True),
            "VAE decoding", decoded,
        ),
    )  # fmt: skip


def largest_validation_size(run: RunConfig, spec: ModelSpec) -> ImageSize:
    """Return (width, height) in pixels of the largest validation image."""
    sizes, _ = parse_sizes(
        run.validation.validation_resolution, run.data, spec.constants.alignment_px
    )
    return max(sizes, key=lambda size: size[0] * size[1])


def peak_bytes(encoder: EncoderPass | None, granule: int, weights: int) -> int:
    """Return the bytes at the highest moment of a pass without gradient; `weights` without one."""
    if encoder is None:
        return weights
    count = MemoryTrackerMode(granule)
    with FakeTensorMode(allow_non_fake_inputs=True), count:
        materialise_parameters(encoder.module, set(), "weights", count)
        with torch.no_grad(), count.track_step():
            encoder.run()
    return count.peak_total_bytes
