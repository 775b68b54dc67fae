"""Captions that do not describe their image, by what the base predicts.

The loss of an image with its own caption is compared with its losses with the captions of other
images, on the same noise. A base that understands the captions predicts better with the right one;
where another caption does as well, the own one is probably wrong. It is the comparison of a
diffusion classifier (Li et al. 2023, arXiv 2303.16203), with captions as classes. It is made before
the first step: a network that has been trained on a wrong caption believes it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.peers import Peers

LoadBatch = Callable[[], Batch]

OTHER_CAPTIONS = 2  # for each image
# Noise levels between which captions matter most: above them most of the loss is the composition,
# and below them the image shows its content itself.
LOWEST_SIGMA, HIGHEST_SIGMA = 0.25, 0.75
MIN_COMPARED_IMAGES = 8
# An image is named when its margin is below this part of the median: between the wrong captions and
# the right ones of `python -m benchmarks.nano.captions`, which overlap a little.
UNFIT_BELOW = 0.33
# Fewer images with a positive margin than this share: the base does not understand the captions.
UNDERSTOOD_SHARE = 0.75


def compared_sigmas(sigmas: Sequence[float]) -> list[int]:
    """Return the indices of the noise levels at which captions are compared."""
    return [index for index, s in enumerate(sigmas) if LOWEST_SIGMA <= s <= HIGHEST_SIGMA]


def measure_margins(
    batches: Sequence[LoadBatch],
    own_losses: Mapping[str, Sequence[float]],
    sigma_indices: Sequence[int],
    losses_of: Callable[[Batch, int], Tensor],
    peers: Peers,
) -> dict[str, float]:
    """Return sample id -> mean loss with other captions minus the loss with the own caption.

    own_losses: of each sample, one per sigma. losses_of: returns the losses (B,) of a batch at the
    index-th sigma. Captions equal to the own one are not compared; a sample without another caption
    has no margin. Every process makes as many passes, and has all margins afterwards.
    """
    margins: dict[str, list[float]] = defaultdict(list)
    for place, number in peers.share_passes(range(len(batches))):
        batch = batches[number]()
        for shift in range(1, OTHER_CAPTIONS + 1):
            text, differs = other_captions(batches, number, shift, batch)
            swapped = dataclasses.replace(batch, text=text)
            columns = [losses_of(swapped, index) for index in sigma_indices]
            means = torch.stack(columns, dim=1).mean(dim=1).tolist()
            for sample, loss, is_other in zip(batch.sample_ids, means, differs, strict=True):
                if is_other and place is not None:
                    own = statistics.fmean(own_losses[sample][index] for index in sigma_indices)
                    margins[sample].append(loss - own)
    return {
        sample: statistics.fmean(values)
        for part in peers.gather_json(dict(margins))
        for sample, values in part.items()
    }


def other_captions(
    batches: Sequence[LoadBatch], number: int, shift: int, batch: Batch
) -> tuple[TextBatch, list[bool]]:
    """Return a text for each sample of a batch, and whether it differs from the sample's own.

    The texts are those of the batch that is `shift` later; of the batch itself, moved by `shift`,
    where there is no other.
    """
    later = (number + shift) % len(batches)
    is_same = later == number
    source = batch.text if is_same else batches[later]().text
    count = len(next(iter(source.lengths.values())))
    rows = [(row + (shift if is_same else 0)) % count for row in range(len(batch.sample_ids))]
    differs = [not _is_same_text(batch.text, row, source, other) for row, other in enumerate(rows)]
    return source.select(rows), differs


def find_unfit(margins: Mapping[str, float]) -> list[str]:
    """Return the images whose caption fits hardly better than other captions, the worst first.

    margins: see measure_margins. Empty for fewer than MIN_COMPARED_IMAGES, and where the base does
    not predict most images better with their own caption.
    """
    values = margins.values()
    if len(values) < MIN_COMPARED_IMAGES:
        return []
    if sum(value > 0 for value in values) < UNDERSTOOD_SHARE * len(values):
        return []
    limit = UNFIT_BELOW * statistics.median(values)
    return sorted((name for name in margins if margins[name] < limit), key=margins.__getitem__)


def _is_same_text(text: TextBatch, row: int, other: TextBatch, other_row: int) -> bool:
    for name, lengths in text.lengths.items():
        length = lengths[row]
        if length != other.lengths[name][other_row]:
            return False
        own_rows, other_rows = text.tensors[name][row], other.tensors[name][other_row]
        if not torch.equal(own_rows[:length], other_rows[:length]):
            return False
    return True
