"""Encode the captions of a run: which, and those that are too long."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cache

from simpletuner.cache import text_cache as text_cache
from simpletuner.cache.target_rules import TargetRules
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.config.schema import ModelOptions, RunConfig
from simpletuner.data.scan import ScanResult
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit, NoticeIssued, WarningIssued
from simpletuner.models.encoders import TextEncoder
from simpletuner.models.family import ModelFamily, ModelFiles
from simpletuner.peers import Peers
from simpletuner.training.device import ComputeDevice

MAX_LISTED_CAPTIONS = 20


def captions_to_encode(scanned: ScanResult, texts: Sequence[str], rules: TargetRules) -> list[str]:
    """Return the captions of all samples, those that the rules add, the texts and ""."""
    read = {caption for item in scanned.samples for caption in item.sample.captions}
    return sorted({"", *texts, *read, *rules.captions(read)})


def encode_captions(
    run: RunConfig,
    family: ModelFamily,
    files: ModelFiles,
    max_tokens: int,
    store: TensorStore,
    captions: Sequence[str],
    device: ComputeDevice,
    world: Peers,
    emit: Emit,
) -> None:
    """Encode the captions that are not cached; the text encoder is loaded only if there are any."""

    @cache
    def load_encoder() -> text_cache.EncodeText:
        encoder = family.load_text_encoder(files, run.model, device.device, emit)
        report_overlong_captions(encoder, captions, max_tokens, run.model, emit)
        return encoder.encode_batches

    text_cache.encode_missing_captions(
        store, captions, load_encoder, emit, run.cache.text_encoder_batch_size, world
    )
    if load_encoder.cache_info().currsize:  # walking through all of torch's objects takes 0.1 s
        load_encoder.cache_clear()
        free_memory(device)


def report_overlong_captions(
    encoder: TextEncoder, captions: Sequence[str], limit: int, options: ModelOptions, emit: Emit
) -> None:
    """Report captions above the token limit: they are never truncated silently.

    Raises DataError when caption_overlong is "error".
    """
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
    captions_are = "1 caption is" if len(overlong) == 1 else f"{len(overlong)} captions are"
    message = f"{captions_are} longer than {limit} tokens:{worst}"
    if options.caption_overlong == "error":
        raise DataError(f"{message}\nShorten them, or set caption_overlong = truncate")
    emit(
        WarningIssued(
            f"{message}\nThe model does not see the text after that (caption_overlong = truncate)"
        )
    )


def free_memory(device: ComputeDevice) -> None:
    """Release the memory of the encoder before the next model is loaded."""
    gc.collect()
    device.hardware.empty_cache()
