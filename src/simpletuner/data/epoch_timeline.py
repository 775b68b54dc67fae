"""Epochs of a run whose datasets start and end at steps or epochs.

The run is divided into segments. Within a segment the same datasets are active, and every epoch has
the same number of micro-batches. Where a dataset starts or ends at a step in the middle of an
epoch, that epoch ends there and another begins. All of it follows from the fields of the datasets,
so a resumed run finds the same segments.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from simpletuner.data.dataset_config import ActivePeriod


@dataclass(frozen=True)
class Segment:
    """Consecutive epochs with the same datasets.

    first_number, first_epoch: where it begins; both count from 0. batches_per_epoch: micro-batches
    of each of its epochs. active: indices of the datasets that are trained on. given: how many
    batches each dataset of the run gave before the segment. ends_early: whether it is the one epoch
    that ends before all of its datasets have given what they would.
    """

    first_number: int
    first_epoch: int
    batches_per_epoch: int
    active: tuple[int, ...]
    given: tuple[int, ...]
    ends_early: bool = False


# (epoch, active datasets, slots) -> how many of the first slots of the epoch each dataset fills.
CountBatches = Callable[[int, tuple[int, ...], int], Sequence[int]]


class EpochTimeline:
    """The segments of a run.

    end_number: the first micro-batch for which no dataset is active; None where there is none.
    """

    def __init__(
        self,
        periods: Sequence[ActivePeriod],
        batches_per_epoch: Sequence[int],
        micro_batches_per_step: int,
        count_batches: CountBatches,
    ) -> None:
        """Divide the run. periods, batches_per_epoch: one per dataset."""
        self._periods = periods
        self._batches_per_epoch = batches_per_epoch
        self._per_step = micro_batches_per_step
        self.end_number: int | None = None
        self.end_epoch: int | None = None
        self.segments = tuple(self._divide(count_batches))
        self._first_numbers = [segment.first_number for segment in self.segments]
        self._first_epochs = [segment.first_epoch for segment in self.segments]

    def locate(self, number: int) -> tuple[Segment, int, int]:
        """Return the segment, the epoch and the slot in the epoch of a micro-batch."""
        segment = self.segments[bisect_right(self._first_numbers, number) - 1]
        epochs, slot = divmod(number - segment.first_number, segment.batches_per_epoch)
        return segment, segment.first_epoch + epochs, slot

    def progress(self, number: int) -> float:
        """Return how many epochs are complete before a micro-batch, with the part of its own."""
        segment, epoch, slot = self.locate(number)
        return epoch + slot / segment.batches_per_epoch

    def first_number(self, epoch: int) -> int | None:
        """Return the first micro-batch of an epoch; None where no dataset is active so late."""
        if self.end_epoch is not None and epoch >= self.end_epoch:
            return self.end_number if epoch == self.end_epoch else None
        segment = self.segments[bisect_right(self._first_epochs, epoch) - 1]
        return segment.first_number + (epoch - segment.first_epoch) * segment.batches_per_epoch

    def _divide(self, count_batches: CountBatches) -> Iterator[Segment]:
        number = epoch = 0
        given = [0] * len(self._periods)
        while True:
            active = tuple(self._active(number // self._per_step, epoch))
            if not active:
                self.end_number, self.end_epoch = number, epoch
                return
            length = sum(self._batches_per_epoch[index] for index in active)
            yield Segment(number, epoch, length, active, tuple(given))
            epochs, slots = self._epochs_until_change(number, epoch, length)
            if epochs is None:
                return
            for index in active:
                given[index] += epochs * self._batches_per_epoch[index]
            number += epochs * length
            epoch += epochs
            if slots:
                # The rest of the segment is an epoch that ends early; what it gives is counted.
                yield Segment(number, epoch, slots, active, tuple(given), ends_early=True)
                for index, count in enumerate(count_batches(epoch, active, slots)):
                    given[index] += count
                number += slots
                epoch += 1

    def _epochs_until_change(self, number: int, epoch: int, length: int) -> tuple[int | None, int]:
        """Return the whole epochs, and the micro-batches after them, before a dataset changes."""
        epochs = min(
            (change - epoch for change in self._changing_epochs() if change > epoch), default=None
        )
        batches = min(
            (
                change * self._per_step - number
                for change in self._changing_steps()
                if change * self._per_step > number
            ),
            default=None,
        )
        if batches is None or (epochs is not None and epochs * length <= batches):
            return epochs, 0
        return divmod(batches, length)

    def _active(self, step: int, epoch: int) -> Iterator[int]:
        for index, period in enumerate(self._periods):
            if period.holds(step, epoch):
                yield index

    def _changing_epochs(self) -> Iterator[int]:
        for period in self._periods:
            yield period.start_epoch - 1
            if period.end_epoch is not None:
                yield period.end_epoch

    def _changing_steps(self) -> Iterator[int]:
        for period in self._periods:
            yield period.start_step
            if period.end_step is not None:
                yield period.end_step
