"""The text cache: the embeddings of each caption, shared by all images that use the caption."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch

from simpletuner.cache.batch_types import TextEmbedding
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.errors import CacheError
from simpletuner.events.event_types import Emit
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.peers import ALONE, Peers

# From batches of captions, and what receives how many captions are done, to their embeddings.
EncodeText = Callable[
    [Sequence[Sequence[str]], Callable[[int], None]], Iterable[Sequence[TextEmbedding]]
]


def text_key(caption: str, fingerprint: str) -> str:
    """Hash a caption together with the fingerprint of the text encoder."""
    return hashlib.sha256(
        f"{fingerprint}\0{caption}".encode("utf-8", "surrogateescape")
    ).hexdigest()


def load_text_embedding(store: TensorStore, caption: str) -> TextEmbedding:
    """Return the caption's tensors. Raises KeyError for a caption that was never encoded."""
    return store.get(text_key(caption, store.fingerprint))


def encode_missing_captions(
    store: TensorStore,
    captions: Iterable[str],
    encoder: Callable[[], EncodeText],
    emit: Emit,
    batch_size: int = 4,
    peers: Peers = ALONE,
) -> None:
    """Encode the captions that are not cached, and always the empty one, for dropped captions.

    Several processes share out whole batches; afterwards the store of each has all captions.
    encoder: makes the encoding function; it is called only when something is missing, and encodes
    all batches, so that it may read its weights once for many of them. The embeddings are stored in
    the dtype that it returns. Raises CacheError for embeddings that are not finite.
    """
    by_key = {text_key(caption, store.fingerprint): caption for caption in ("", *captions)}
    # Sorted by length, because the encoder pads each batch to its longest caption.
    missing = peers.broadcast_json(
        sorted(store.missing_keys(by_key), key=lambda key: (len(by_key[key]), key))
    )
    if not missing:
        return
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    own = [keys for _, keys in peers.share(batches)]
    with (
        StageReporter(emit, "encode text", sum(map(len, own)), "captions") as stage,
        store.flush_on_exit(),
    ):
        stage.summary = f"{len(by_key) - len(missing)} already cached"
        texts = [[by_key[key] for key in keys] for keys in own]
        encoded = encoder()(texts, stage.advance) if own else ()
        for keys, embeddings in zip(own, encoded, strict=True):
            for key, embedding in zip(keys, embeddings, strict=True):
                tensors = embedding.values()
                if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                    raise CacheError(
                        f"the text encoder returned NaN or infinity for the caption"
                        f" {by_key[key][:80]!r}; check its weights, or set mixed_precision to no"
                    )
                store.put(key, embedding)
    peers.gather_json(None)  # every process has written its shards
    store.adopt_new_shards()
