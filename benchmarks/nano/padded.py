"""`simpletuner train` with 512 text rows, none of them masked, as some trainers do by accident.

    python -m benchmarks.nano.padded --config PATH

The extra rows are the text encoder's own outputs for pad tokens. The product never makes such rows and its
caches do not know of them: a run of this program needs a cache_dir of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from benchmarks.nano.experiments import PADDED_ROWS
from torch import Tensor

from simpletuner.cli import main
from simpletuner.models.chroma.fingerprints import T5_TENSOR
from simpletuner.models.chroma.text_encoder import ChromaTextEncoder


@torch.no_grad()
def encode_padded(self: ChromaTextEncoder, captions: Sequence[str]) -> list[dict[str, Tensor]]:
    """(512, D) for each caption: real tokens are masked from pads inside T5, and all its rows are
    kept.
    """
    ids = torch.full((len(captions), PADDED_ROWS), self._tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, caption in enumerate(captions):
        tokens = self._tokenize(caption)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    hidden = self._t5(input_ids=ids, attention_mask=mask).last_hidden_state.clone()
    return [{T5_TENSOR: rows} for rows in hidden]


if __name__ == "__main__":
    ChromaTextEncoder.encode = encode_padded  # type: ignore[method-assign]
    sys.argv = ["simpletuner", "train", *sys.argv[1:]]
    main()
