"""`simpletuner train` with 512 text rows, none of them masked, as some trainers do by accident.

    python -m benchmarks.nano.padded --config PATH

The extra rows are the text encoder's own outputs for pad tokens. The product never makes such rows and its
caches do not know of them: a run of this program needs a cache_dir of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from benchmarks.nano.experiments import PADDED_ROWS

from simpletuner.cli import main
from simpletuner.models.chroma.text_encoder import ChromaTextEncoder

make_trimmed_batch = ChromaTextEncoder._make_batch


def make_padded_batch(self: ChromaTextEncoder, captions: Sequence[str]) -> Any:
    """Return a batch of 512 tokens for each caption, all of whose rows are kept.

    Real tokens are masked from pads inside T5.
    """
    batch = make_trimmed_batch(self, captions)
    pads = (len(batch.tokens), PADDED_ROWS - batch.ids.shape[1])
    return replace(
        batch,
        ids=torch.cat([batch.ids, torch.full(pads, self._tokenizer.pad_token_id)], dim=1),
        mask=torch.cat([batch.mask, torch.zeros(pads, dtype=batch.mask.dtype)], dim=1),
        lengths=[PADDED_ROWS] * len(batch.tokens),
    )


if __name__ == "__main__":
    ChromaTextEncoder._make_batch = make_padded_batch  # type: ignore[method-assign]
    sys.argv = ["simpletuner", "train", *sys.argv[1:]]
    main()
