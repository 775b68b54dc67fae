"""Order of the samples: a pure function of the seed and the number of the micro-batch.

A round of a dataset uses each of its samples exactly repeats + 1 times, in batches of one bucket;
samples that do not fill a batch form a smaller one. An epoch holds one round of every dataset when
their probabilities are equal. A dataset of lower probability gives only that fraction (relative to
the largest) of its round's batches to an epoch and continues in the next: over 1 / fraction epochs
it, too, uses every sample repeats + 1 times.

data_backend_sampling mixes the datasets of an epoch: "auto-weighting" spreads each over the whole
epoch, "uniform" gives every dataset that is not exhausted the same chance at each batch, so small
ones end early.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.sample_types import BucketedSample, MicroBatchPlan, SampleVisit
from simpletuner.errors import DataError
from simpletuner.events.formatting import count_of
from simpletuner.randomness import seed_at


@dataclass(frozen=True)
class BatchSource:
    """A dataset divided into batches.

    buckets: (width, height) in px -> int32 indices into the run's tuple of samples.
    batches_per_epoch: how many of a round's batches an epoch takes.
    """

    dataset: DatasetConfig
    buckets: dict[tuple[int, int], np.ndarray]
    batches_per_round: int
    batches_per_epoch: int


@dataclass(frozen=True)
class ShuffledRound:
    """One round of a dataset: batch i is sample_indices[batch_spans[i, 0] : batch_spans[i, 1]].

    sample_indices: int32, into the run's samples. repeat_indices: which repeat each use is.
    batch_spans: shuffled.
    """

    sample_indices: np.ndarray
    repeat_indices: np.ndarray
    batch_spans: np.ndarray


class SampleOrder:
    """Order of all micro-batches of a run.

    batches_per_epoch: micro-batches of an epoch, the same for all. notices: for the user. The last
    rounds and the last epoch are cached; they can always be computed again.
    """

    def __init__(
        self,
        placed: Sequence[BucketedSample],
        datasets: Sequence[DatasetConfig],
        seed: int,
        batch_size: int,
        options: DataOptions,
    ) -> None:
        """Prepare the order.

        batch_size: samples in a micro-batch. Raises DataError without samples.
        """
        self._placed = placed
        self._seed = seed
        self._batch_size = batch_size
        self._options = options
        self._sources = _make_sources(placed, datasets, batch_size)
        self.batches_per_epoch = sum(source.batches_per_epoch for source in self._sources)
        self.notices = tuple(
            note for source in self._sources for note in _batch_notices(source, batch_size)
        )
        self._rounds: dict[tuple[int, int], ShuffledRound] = {}
        self._mixed_epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def micro_batch(self, number: int) -> MicroBatchPlan:
        """Return the micro-batch with this global number, from 0.

        The first micro-batch of an epoch costs its permutation.
        """
        epoch, slot = divmod(number, self.batches_per_epoch)
        which, nth = self._mix_datasets(epoch)
        source = self._sources[which[slot]]
        turn, at = divmod(
            epoch * source.batches_per_epoch + int(nth[slot]), source.batches_per_round
        )
        current = self._get_round(int(which[slot]), turn)
        members = slice(*current.batch_spans[at])
        pairs = zip(
            current.sample_indices[members].tolist(), current.repeat_indices[members].tolist()
        )
        visits = tuple(self._make_visit(index, turn, pass_) for index, pass_ in pairs)
        return MicroBatchPlan(number, epoch, visits)

    def passes_per_epoch(self) -> list[tuple[str, float]]:
        """Return for each dataset how often an epoch uses one of its samples, on average."""
        return [
            (
                source.dataset.id,
                (source.dataset.repeats + 1) * source.batches_per_epoch / source.batches_per_round,
            )
            for source in self._sources
        ]

    def _make_visit(self, index: int, turn: int, pass_: int) -> SampleVisit:
        sample = self._placed[index].sample
        dropped = seed_at(self._seed, "caption_dropout", sample.id, turn, pass_) / 2**63
        if dropped < self._options.caption_dropout_probability:
            return SampleVisit(index, turn, pass_, None)
        caption = seed_at(self._seed, "caption", sample.id, turn, pass_) % len(sample.captions)
        return SampleVisit(index, turn, pass_, caption)

    def _mix_datasets(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for every slot of an epoch the source, and which of the source's batches it is."""
        if self._mixed_epoch is None or self._mixed_epoch[0] != epoch:
            rng = np.random.Generator(
                np.random.Philox(seed_at(self._seed, "order of datasets", epoch))
            )
            # Exponential waiting times: whichever source comes next is equally likely to be any
            # that is left.
            uniform = self._options.data_backend_sampling == "uniform"
            times = [
                np.cumsum(rng.exponential(size=source.batches_per_epoch))
                if uniform
                else rng.random(source.batches_per_epoch)
                for source in self._sources
            ]
            counts = [source.batches_per_epoch for source in self._sources]
            order = np.argsort(np.concatenate(times), kind="stable")
            which = np.repeat(np.arange(len(counts)), counts)
            nth = np.concatenate([np.arange(count) for count in counts])
            self._mixed_epoch = epoch, which[order], nth[order]
        return self._mixed_epoch[1], self._mixed_epoch[2]

    def _get_round(self, which: int, turn: int) -> ShuffledRound:
        found = self._rounds.get((which, turn))
        if found is None:
            # An epoch of a source with a share below one can straddle two rounds: both are kept.
            for key in [key for key in self._rounds if key[0] == which and abs(key[1] - turn) > 1]:
                del self._rounds[key]
            source = self._sources[which]
            found = self._rounds[which, turn] = _shuffle_round(
                source, self._batch_size, self._seed, turn
            )
        return found


def _make_sources(
    placed: Sequence[BucketedSample], datasets: Sequence[DatasetConfig], batch_size: int
) -> list[BatchSource]:
    members: dict[str, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, item in enumerate(placed):
        members[item.sample.dataset][item.bucket_px].append(index)
    used = [dataset for dataset in datasets if dataset.id in members]
    if not used:
        raise DataError("there is no image to train on")
    largest = max(dataset.probability for dataset in used)
    sources = []
    for dataset in used:
        sizes = sorted(members[dataset.id].items())
        buckets = {size: np.array(indices, np.int32) for size, indices in sizes}
        batches = sum(
            -(-len(bucket) * (dataset.repeats + 1) // batch_size) for bucket in buckets.values()
        )
        share = dataset.probability / largest
        sources.append(BatchSource(dataset, buckets, batches, max(1, round(batches * share))))
    return sources


def _shuffle_round(source: BatchSource, batch_size: int, seed: int, turn: int) -> ShuffledRound:
    rng = np.random.Generator(np.random.Philox(seed_at(seed, "order", source.dataset.id, turn)))
    passes = source.dataset.repeats + 1
    visits, which_pass, spans = [], [], []
    begin = 0
    for bucket in source.buckets.values():
        end = begin + len(bucket) * passes
        # Pass after pass, so that a batch holds a sample twice only where a small bucket leaves no
        # choice.
        visits += [rng.permutation(bucket) for _ in range(passes)]
        which_pass.append(np.repeat(np.arange(passes, dtype=np.int32), len(bucket)))
        first = np.arange(begin, end, batch_size)
        spans.append(np.stack([first, np.minimum(first + batch_size, end)], axis=1))
        begin = end
    order = rng.permutation(source.batches_per_round)
    return ShuffledRound(
        np.concatenate(visits), np.concatenate(which_pass), np.concatenate(spans)[order]
    )


def _batch_notices(source: BatchSource, batch_size: int) -> list[str]:
    name, passes = source.dataset.id, source.dataset.repeats + 1
    notes = []
    for (width, height), bucket in source.buckets.items():
        visits = len(bucket) * passes
        if visits < batch_size:
            notes.append(
                f"{name}: bucket {width}x{height} has {count_of(visits, 'image')} per round, "
                f"fewer than a batch of {batch_size}; it is trained with a batch of {visits}"
            )
    short = sum(len(bucket) * passes % batch_size > 0 for bucket in source.buckets.values())
    if short > len(notes):
        notes.append(
            f"{name}: {short} of {source.batches_per_round} batches per round are smaller than "
            f"{batch_size}"
        )
    if source.batches_per_epoch < source.batches_per_round:
        notes.append(
            f"{name}: probability gives {source.batches_per_epoch} of its "
            f"{source.batches_per_round} batches to an epoch"
        )
    return notes
