"""The text cache: for each caption its rows, (tokens + 1, width), once for all pictures that share it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from simpletuner.cache.tensor_store import TensorStore
from simpletuner.errors import CacheError
from simpletuner.events.event_types import Emit
from simpletuner.events.stage_reporter import StageReporter

EncodeText = Callable[[Sequence[str]], list[Tensor]]


def text_key(caption: str, fingerprint: str) -> str:
    return hashlib.sha256(
        f"{fingerprint}\0{caption}".encode("utf-8", "surrogateescape")
    ).hexdigest()


def load_text_embeddings(store: TensorStore, caption: str) -> Tensor:
    """(L, D) in the dtype of the cache. KeyError when the caption was never encoded."""
    return store.get(text_key(caption, store.fingerprint))["rows"]


def encode_missing_captions(
    store: TensorStore,
    captions: Iterable[str],
    encoder: Callable[[], EncodeText],
    emit: Emit,
    batch_size: int = 4,
) -> None:
    """Encode what is missing; the empty caption (for dropped ones) always belongs to it.

    encoder: makes the encoding function; called only when something is missing. Rows are stored in the dtype
    they come in. CacheError when a caption's rows are not finite.
    """
    by_key = {text_key(caption, store.fingerprint): caption for caption in ("", *captions)}
    # Captions of like length together: the encoder pads each batch to its longest.
    missing = sorted(store.missing_keys(by_key), key=lambda key: (len(by_key[key]), key))
    if not missing:
        return
    encode = encoder()
    with (
        StageReporter(emit, "encode text", len(missing), "captions") as stage,
        store.flush_on_exit(),
    ):
        stage.summary = f"{len(by_key) - len(missing)} were in the cache"
        for start in range(0, len(missing), batch_size):
            keys = missing[start : start + batch_size]
            for key, rows in zip(keys, encode([by_key[key] for key in keys]), strict=True):
                if not bool(torch.isfinite(rows).all()):
                    raise CacheError(
                        f"the text encoder gives NaN or infinity for {by_key[key][:80]!r}"
                    )
                store.put(key, {"rows": rows})
            stage.advance(len(keys))
