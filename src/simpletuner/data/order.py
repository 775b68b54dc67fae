"""Which samples go through the network when: a pure function of (seed, number of the micro-batch).

A round of a dataset visits each of its samples exactly repeats + 1 times, in batches of one bucket; what does
not fill a batch makes a smaller one. An epoch holds one round of every dataset when their probabilities are
equal. A dataset of lower probability gives only that share (relative to the largest) of its round's batches
to an epoch and goes on in the next: over 1 / share epochs it, too, visits every sample repeats + 1 times.

data_backend_sampling mixes the datasets of an epoch: "auto-weighting" spreads each over the whole epoch,
"uniform" gives every dataset that is not exhausted the same chance at each batch, so small ones end early.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset import Dataset
from simpletuner.data.types import MicroBatch, Placed, Visit
from simpletuner.errors import DataError
from simpletuner.randomness import seed_at


@dataclass(frozen=True)
class Source:
    """A dataset cut into batches. batches: in a round; per_epoch: of these, how many an epoch takes.

    buckets: (width, height) in px -> int32 indices into the run's tuple of Placed.
    """

    dataset: Dataset
    buckets: dict[tuple[int, int], np.ndarray]
    batches: int
    per_epoch: int


@dataclass(frozen=True)
class Round:
    """One pass over a dataset with its repeats: batch i is visits[spans[i, 0] : spans[i, 1]].

    visits: int32 indices into Placed. passes: which repeat each visit is. spans: shuffled.
    """

    visits: np.ndarray
    passes: np.ndarray
    spans: np.ndarray


class Order:
    """batches_per_epoch: micro-batches of an epoch, the same for all. notes: what a person should know.

    Holds the last rounds and the last epoch it worked out, nothing that cannot be worked out again.
    """

    def __init__(
        self,
        placed: Sequence[Placed],
        datasets: Sequence[Dataset],
        seed: int,
        batch_size: int,
        options: DataOptions,
    ) -> None:
        """batch_size: samples in a micro-batch. Refuses an order without samples."""
        self._placed = placed
        self._seed = seed
        self._batch_size = batch_size
        self._options = options
        self._sources = _sources(placed, datasets, batch_size)
        self.batches_per_epoch = sum(source.per_epoch for source in self._sources)
        self.notes = tuple(note for source in self._sources for note in _notes(source, batch_size))
        self._rounds: dict[tuple[int, int], Round] = {}
        self._mixed: tuple[int, np.ndarray, np.ndarray] | None = None

    def micro_batch(self, number: int) -> MicroBatch:
        """The micro-batch with this global number, from 0. The first of an epoch costs its permutation."""
        epoch, slot = divmod(number, self.batches_per_epoch)
        which, nth = self._mix(epoch)
        source = self._sources[which[slot]]
        turn, at = divmod(epoch * source.per_epoch + int(nth[slot]), source.batches)
        current = self._round(int(which[slot]), turn)
        members = slice(*current.spans[at])
        pairs = zip(current.visits[members].tolist(), current.passes[members].tolist())
        visits = tuple(self._visit(index, turn, pass_) for index, pass_ in pairs)
        return MicroBatch(number, epoch, visits)

    def _visit(self, index: int, turn: int, pass_: int) -> Visit:
        sample = self._placed[index].sample
        dropped = seed_at(self._seed, "caption_dropout", sample.id, turn, pass_) / 2**63
        if dropped < self._options.caption_dropout_probability:
            return Visit(index, turn, pass_, None)
        caption = seed_at(self._seed, "caption", sample.id, turn, pass_) % len(sample.captions)
        return Visit(index, turn, pass_, caption)

    def _mix(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """For every slot of an epoch: the source, and the how-manieth batch it gives to this epoch."""
        if self._mixed is None or self._mixed[0] != epoch:
            rng = np.random.Generator(np.random.Philox(seed_at(self._seed, "order of datasets", epoch)))
            # Exponential waiting times: whichever source comes next is equally likely to be any that is left.
            uniform = self._options.data_backend_sampling == "uniform"
            times = [
                np.cumsum(rng.exponential(size=source.per_epoch)) if uniform else rng.random(source.per_epoch)
                for source in self._sources
            ]
            counts = [source.per_epoch for source in self._sources]
            order = np.argsort(np.concatenate(times), kind="stable")
            which = np.repeat(np.arange(len(counts)), counts)
            nth = np.concatenate([np.arange(count) for count in counts])
            self._mixed = epoch, which[order], nth[order]
        return self._mixed[1], self._mixed[2]

    def _round(self, which: int, turn: int) -> Round:
        found = self._rounds.get((which, turn))
        if found is None:
            # An epoch of a source with a share below one can straddle two rounds: both are kept.
            for key in [key for key in self._rounds if key[0] == which and abs(key[1] - turn) > 1]:
                del self._rounds[key]
            source = self._sources[which]
            found = self._rounds[which, turn] = _shuffled(source, self._batch_size, self._seed, turn)
        return found


def _sources(placed: Sequence[Placed], datasets: Sequence[Dataset], batch_size: int) -> list[Source]:
    members: dict[str, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, item in enumerate(placed):
        members[item.sample.dataset][item.bucket_px].append(index)
    used = [dataset for dataset in datasets if dataset.id in members]
    if not used:
        raise DataError("there is no picture to train on")
    largest = max(dataset.probability for dataset in used)
    sources = []
    for dataset in used:
        sizes = sorted(members[dataset.id].items())
        buckets = {size: np.array(indices, np.int32) for size, indices in sizes}
        batches = sum(-(-len(bucket) * (dataset.repeats + 1) // batch_size) for bucket in buckets.values())
        share = dataset.probability / largest
        sources.append(Source(dataset, buckets, batches, max(1, round(batches * share))))
    return sources


def _shuffled(source: Source, batch_size: int, seed: int, turn: int) -> Round:
    rng = np.random.Generator(np.random.Philox(seed_at(seed, "order", source.dataset.id, turn)))
    passes = source.dataset.repeats + 1
    visits, which_pass, spans = [], [], []
    begin = 0
    for bucket in source.buckets.values():
        end = begin + len(bucket) * passes
        # Pass after pass, so that a sample meets itself only where a small bucket leaves no choice.
        visits += [rng.permutation(bucket) for _ in range(passes)]
        which_pass.append(np.repeat(np.arange(passes, dtype=np.int32), len(bucket)))
        first = np.arange(begin, end, batch_size)
        spans.append(np.stack([first, np.minimum(first + batch_size, end)], axis=1))
        begin = end
    order = rng.permutation(source.batches)
    return Round(np.concatenate(visits), np.concatenate(which_pass), np.concatenate(spans)[order])


def _notes(source: Source, batch_size: int) -> list[str]:
    name, passes = source.dataset.id, source.dataset.repeats + 1
    notes = []
    for (width, height), bucket in source.buckets.items():
        visits = len(bucket) * passes
        if visits < batch_size:
            notes.append(
                f"{name}: bucket {width}x{height} has {visits} visits, fewer than a batch of {batch_size}; "
                f"it trains with a batch of {visits}"
            )
    short = sum(len(bucket) * passes % batch_size > 0 for bucket in source.buckets.values())
    if short > len(notes):
        notes.append(f"{name}: {short} of {source.batches} batches per round are smaller than {batch_size}")
    if source.per_epoch < source.batches:
        notes.append(
            f"{name}: probability gives {source.per_epoch} of its {source.batches} batches to an epoch"
        )
    return notes
