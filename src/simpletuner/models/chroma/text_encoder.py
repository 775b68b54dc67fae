"""Captions to T5 embeddings: the real tokens including `</s>`, plus exactly one pad token.

The values equal those of T5 on 512 padded tokens with the tokenizer's mask, of which the first
tokens + 1 rows are kept, at a fraction of the cost: masked keys do not contribute, and T5's
positions are relative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from simpletuner.cache.batch_types import TextEmbedding
from simpletuner.config.schema import ModelOptions
from simpletuner.errors import DataError, ModelError
from simpletuner.events.event_types import Emit
from simpletuner.models.chroma.fingerprints import MAX_TOKENS, T5_TENSOR, token_limit
from simpletuner.models.chroma.t5 import LayeredT5, load_t5
from simpletuner.models.encoders import TextEncoder
from simpletuner.models.family import ModelFiles

# Hidden states of the batches that a layer is applied to before the next layer is read. On a CPU
# the weights are read at the cost of a copy, and less work is lost when a run is stopped.
CHUNK_BYTES = {"cuda": 1_000_000_000, "mps": 1_000_000_000, "cpu": 64_000_000}


@dataclass(frozen=True)
class _TokenBatch:
    """ids, mask: (B, L). tokens: the real tokens of each caption; length: with its pad token."""

    ids: Tensor
    mask: Tensor
    tokens: list[list[int]]
    lengths: list[int]


@dataclass(frozen=True)
class ChromaTextEncoder(TextEncoder):
    """T5 v1.1's encoder with its tokenizer.

    overlong: "truncate" cuts captions before `</s>`, "error" raises DataError.
    """

    _t5: LayeredT5
    _tokenizer: PreTrainedTokenizerBase
    _max_tokens: int = MAX_TOKENS
    _zero_pad: bool = False
    _overlong: str = "truncate"

    def token_count(self, caption: str) -> int:
        return len(self._tokenizer(caption, verbose=False)["input_ids"])

    def encode(self, captions: Sequence[str]) -> list[TextEmbedding]:
        if not captions:
            return []
        return next(iter(self.encode_batches([captions])))

    def encode_batches(
        self,
        batches: Sequence[Sequence[str]],
        advance: Callable[[int], None] = lambda captions: None,
    ) -> Iterator[list[TextEmbedding]]:
        chunk: list[_TokenBatch] = []
        size = 0
        for captions in batches:
            batch = self._make_batch(captions)
            batch_size = batch.ids.numel() * self._t5.width * self._t5.dtype.itemsize
            if chunk and size + batch_size > CHUNK_BYTES[self._t5.device.type]:
                yield from self._encode_chunk(chunk, advance)
                chunk, size = [], 0
            chunk.append(batch)
            size += batch_size
        if chunk:
            yield from self._encode_chunk(chunk, advance)

    def _encode_chunk(
        self, chunk: Sequence[_TokenBatch], advance: Callable[[int], None]
    ) -> Iterator[list[TextEmbedding]]:
        """Run all layers on these batches. advance: a layer counts as its share of the captions."""
        captions = sum(len(batch.tokens) for batch in chunk)

        def layer_done(done: int, layers: int) -> None:
            advance(captions * done // layers - captions * (done - 1) // layers)

        hidden = self._t5.encode(
            [self._t5.embed(batch.ids) for batch in chunk],
            [batch.mask for batch in chunk],
            layer_done,
        )
        hidden.reverse()
        for batch in chunk:
            yield self._embeddings_of(batch, hidden.pop())

    def _make_batch(self, captions: Sequence[str]) -> _TokenBatch:
        tokens = [self._tokenize(caption) for caption in captions]
        lengths = [min(len(ids) + 1, self._max_tokens) for ids in tokens]
        ids = torch.full((len(tokens), max(lengths)), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(tokens):
            ids[row, : len(sample)] = torch.tensor(sample)
            mask[row, : len(sample)] = 1
        return _TokenBatch(ids, mask, tokens, lengths)

    def _embeddings_of(self, batch: _TokenBatch, hidden: Tensor) -> list[TextEmbedding]:
        rows = [hidden[row, :length].clone() for row, length in enumerate(batch.lengths)]
        if self._zero_pad:
            for row, sample in zip(rows, batch.tokens, strict=True):
                row[len(sample) :] = 0
        return [{T5_TENSOR: embedding} for embedding in rows]

    def _tokenize(self, caption: str) -> list[int]:
        if self._overlong == "error" and (count := self.token_count(caption)) > self._max_tokens:
            raise DataError(
                f"A caption has {count} tokens, but the limit is {self._max_tokens}:"
                f' {caption[:60]!r}... Shorten it, or set caption_overlong to "truncate".'
            )
        tokens: list[int] = self._tokenizer(
            caption, truncation=True, max_length=self._max_tokens, verbose=False
        )["input_ids"]
        return tokens


def load_text_encoder(
    source: ModelFiles, options: ModelOptions, device: torch.device, emit: Emit
) -> ChromaTextEncoder:
    """Load T5 and its tokenizer with the options' limits."""
    return ChromaTextEncoder(
        load_t5(source, options, device, emit),
        load_tokenizer(source.tokenizer),
        token_limit(options),
        options.flux_t5_padding == "zero",
        options.caption_overlong,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load T5's tokenizer. Raises ModelError for a folder without one, or with another one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"{folder} does not hold a readable tokenizer: {reason}") from None
    if tokenizer.pad_token_id is None or tokenizer("")["input_ids"][-1:] != [
        tokenizer.eos_token_id
    ]:
        raise ModelError(
            f"{folder} is not T5's tokenizer: captions must end with </s> and a pad token must"
            " exist."
        )
    return tokenizer
