"""Order of the samples: a pure function of the seed and the number of the micro-batch.

A round of a dataset uses each of its samples exactly repeats + 1 times, in batches of one bucket;
samples that do not fill a batch form a smaller one. An epoch holds one round of every dataset when
their probabilities are equal. A dataset of lower probability gives only that fraction (relative to
the largest) of its round's batches to an epoch and continues in the next: over 1 / fraction epochs
it, too, uses every sample repeats + 1 times. Regularisation datasets are limited in the same way,
so that 5,000 of their images do not outnumber 50 that teach (regularisation_ratio).

data_backend_sampling mixes the datasets of an epoch: "auto-weighting" spreads each over the whole
epoch, "uniform" gives every dataset that is not exhausted the same chance at each batch, so small
ones end early. A dataset that starts or ends within the run changes the length of the epochs: see
epoch_timeline.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from simpletuner.config.schema import DataOptions
from simpletuner.data.batch_sources import (
    ShuffledRound,
    batch_notices,
    make_sources,
    shuffle_round,
)
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.epoch_timeline import EpochTimeline
from simpletuner.data.sample_types import BucketedSample, MicroBatchPlan, Sample, SampleVisit
from simpletuner.errors import DataError
from simpletuner.randomness import seed_at


class SampleOrder:
    """Order of all micro-batches of a run.

    timeline: its epochs. batches_per_epoch: micro-batches of the first one. notices: for the user.
    The last rounds and the last epoch are cached; they can always be computed again.
    """

    def __init__(
        self,
        placed: Sequence[BucketedSample],
        datasets: Sequence[DatasetConfig],
        seed: int,
        batch_size: int,
        options: DataOptions,
        micro_batches_per_step: int = 1,
    ) -> None:
        """Prepare the order.

        batch_size: samples in a micro-batch, where a dataset sets none. Raises DataError without
        samples, and where no dataset is active in the first epoch.
        """
        self._placed = placed
        self._seed = seed
        self._options = options
        self._sources = make_sources(placed, datasets, batch_size, options.regularisation_ratio)
        self._rounds: dict[tuple[int, int], ShuffledRound] = {}
        self._mixed_epoch: tuple[object, np.ndarray, np.ndarray] | None = None
        self.timeline = EpochTimeline(
            [source.dataset.active for source in self._sources],
            [source.batches_per_epoch for source in self._sources],
            micro_batches_per_step,
            self._count_batches,
        )
        if not self.timeline.segments:
            raise DataError(
                "no dataset with images is active in the first step: one needs start_step 0 and "
                "start_epoch 1"
            )
        self.batches_per_epoch = self.timeline.segments[0].batches_per_epoch
        self.notices = tuple(note for source in self._sources for note in batch_notices(source))

    def micro_batch(self, number: int) -> MicroBatchPlan:
        """Return the micro-batch with this global number, from 0.

        The first micro-batch of an epoch costs its permutation.
        """
        segment, epoch, slot = self.timeline.locate(number)
        which, nth = self._mix_datasets(epoch, segment.active, segment.ends_early)
        chosen = int(which[slot])
        source = self._sources[chosen]
        given = (
            segment.given[chosen]
            + (epoch - segment.first_epoch) * source.batches_per_epoch
            + int(nth[slot])
        )
        turn, at = divmod(given, source.batches_per_round)
        current = self._get_round(chosen, turn)
        members = slice(*current.batch_spans[at])
        pairs = zip(
            current.sample_indices[members].tolist(), current.repeat_indices[members].tolist()
        )
        visits = tuple(self._make_visit(index, turn, pass_) for index, pass_ in pairs)
        return MicroBatchPlan(number, epoch, visits)

    def passes_before(self, number: int) -> dict[str, float]:
        """Return for each dataset how often a sample is used, on average, before a micro-batch."""
        end = self.timeline.end_number
        last = (number if end is None else min(number, end)) - 1
        segment, epoch, slot = self.timeline.locate(last)
        counts = self._count_batches(epoch, segment.active, slot + 1)
        for index in segment.active:
            whole = (epoch - segment.first_epoch) * self._sources[index].batches_per_epoch
            counts[index] += whole
        return {
            source.dataset.id: (given + count) * source.passes / source.batches_per_round
            for source, given, count in zip(self._sources, segment.given, counts, strict=True)
        }

    def _make_visit(self, index: int, turn: int, pass_: int) -> SampleVisit:
        sample = self._placed[index].sample
        # 63 random bits as a number in [0, 1).
        dropped = seed_at(self._seed, "caption_dropout", sample.id, turn, pass_) / 2**63
        if dropped < self._options.caption_dropout_probability:
            return SampleVisit(index, turn, pass_, None)
        drawn = seed_at(self._seed, "caption", sample.id, turn, pass_)
        return SampleVisit(index, turn, pass_, _choose_caption(sample, drawn))

    def _mix_datasets(
        self, epoch: int, active: tuple[int, ...], in_turn: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return for every slot of an epoch the source, and which of the source's batches it is.

        active: indices of the sources that take part. in_turn: whether each source gives its
        batches in their order, so that an epoch that ends early gives the first ones.
        """
        key = epoch, active, in_turn
        if self._mixed_epoch is None or self._mixed_epoch[0] != key:
            rng = np.random.Generator(
                np.random.Philox(seed_at(self._seed, "order of datasets", epoch))
            )
            # Exponential waiting times: whichever source comes next is equally likely to be any
            # that is left.
            uniform = self._options.data_backend_sampling == "uniform"
            counts = [self._sources[index].batches_per_epoch for index in active]
            times = [
                np.cumsum(rng.exponential(size=count)) if uniform else rng.random(count)
                for count in counts
            ]
            if in_turn:
                times = [np.sort(own) for own in times]
            order = np.argsort(np.concatenate(times), kind="stable")
            which = np.repeat(np.array(active), counts)
            nth = np.concatenate([np.arange(count) for count in counts])
            self._mixed_epoch = key, which[order], nth[order]
        return self._mixed_epoch[1], self._mixed_epoch[2]

    def _count_batches(self, epoch: int, active: tuple[int, ...], slots: int) -> list[int]:
        which, _ = self._mix_datasets(epoch, active, in_turn=True)
        counts = np.bincount(which[:slots], minlength=len(self._sources))
        return [int(count) for count in counts]

    def _get_round(self, which: int, turn: int) -> ShuffledRound:
        order = self._rounds.get((which, turn))
        if order is None:
            # An epoch of a source with a share below one can straddle two rounds: both are kept.
            for key in [key for key in self._rounds if key[0] == which and abs(key[1] - turn) > 1]:
                del self._rounds[key]
            order = shuffle_round(self._sources[which], self._seed, turn)
            self._rounds[which, turn] = order
        return order


def _choose_caption(sample: Sample, drawn: int) -> int:
    """Return the index of a caption. drawn: 63 random bits."""
    if not sample.caption_weights:
        return drawn % len(sample.captions)
    edges = list(accumulate(sample.caption_weights))
    return min(bisect_right(edges, drawn / 2**63 * edges[-1]), len(edges) - 1)
