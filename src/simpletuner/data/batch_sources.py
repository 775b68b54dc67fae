"""Batches of a dataset: its buckets, the rounds through them, and the order of a round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.geometry import ImageSize
from simpletuner.data.sample_types import BucketedSample
from simpletuner.errors import DataError
from simpletuner.events.formatting import count_of
from simpletuner.randomness import seed_at

BucketSizes = tuple[ImageSize, ...]  # of the crops of a sample


@dataclass(frozen=True)
class BatchSource:
    """A dataset divided into batches.

    buckets: (width, height) in px of each crop -> int32 indices of the first crops in the run's
    tuple of samples. crops: how many crops each sample has; they follow each other in the tuple.
    batch_size: samples of a batch. batches_per_epoch: how many of a round's batches an epoch takes.
    weights: of the samples of each bucket; without an entry all are used equally often.
    """

    dataset: DatasetConfig
    buckets: dict[BucketSizes, np.ndarray]
    crops: int
    batch_size: int
    batches_per_round: int
    batches_per_epoch: int
    weights: Mapping[BucketSizes, np.ndarray] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """Return how often a round uses each sample; with weights, on average."""
        return self.dataset.repeats + 1


@dataclass(frozen=True)
class ShuffledRound:
    """One round of a dataset: batch i is sample_indices[batch_spans[i, 0] : batch_spans[i, 1]].

    sample_indices: int32, into the run's samples. repeat_indices: which repeat each use is; unique
    for a sample. batch_spans: shuffled.
    """

    sample_indices: np.ndarray
    repeat_indices: np.ndarray
    batch_spans: np.ndarray


def make_sources(
    placed: Sequence[BucketedSample],
    datasets: Sequence[DatasetConfig],
    batch_size: int,
    regularisation_ratio: float = 0.0,
) -> list[BatchSource]:
    """Return one source per dataset with samples. Raises DataError where there is none."""
    members: dict[str, dict[BucketSizes, list[int]]] = defaultdict(lambda: defaultdict(list))
    crops: dict[str, int] = {}
    firsts = [index for index, item in enumerate(placed) if item.crop_index == 0]
    for index, end in zip(firsts, [*firsts, len(placed)][1:], strict=True):
        name = placed[index].sample.dataset
        sizes = tuple(item.bucket_px for item in placed[index:end])
        members[name][sizes].append(index)
        crops[name] = end - index
    used = [dataset for dataset in datasets if dataset.id in members]
    if not used:
        raise DataError("there is no image to train on")
    # Relative to the largest, so that equal probabilities mean whole rounds, whatever they are.
    largest = max(dataset.probability for dataset in used)
    sources = []
    for dataset in used:
        own_size = dataset.resize_crop.train_batch_size or batch_size
        buckets = {
            sizes: np.array(indices, np.int32)
            for sizes, indices in sorted(members[dataset.id].items())
        }
        batches = sum(
            len(_batch_starts(sizes, len(bucket), dataset.repeats + 1, own_size))
            for sizes, bucket in buckets.items()
        )
        share = max(1, round(batches * dataset.probability / largest))
        weights = _unequal_weights(placed, buckets)
        sources.append(
            BatchSource(dataset, buckets, crops[dataset.id], own_size, batches, share, weights)
        )
    return _limit_regularisation(sources, regularisation_ratio)


def _limit_regularisation(sources: list[BatchSource], ratio: float) -> list[BatchSource]:
    """Return the sources with the regularisation datasets limited to their part of an epoch.

    ratio: of their batches to those of the other datasets; 0 does not limit them. All are reduced
    by the same factor.
    """
    regularising = [source for source in sources if source.dataset.regularisation_target]
    total = sum(source.batches_per_epoch for source in regularising)
    limit = (sum(source.batches_per_epoch for source in sources) - total) * ratio
    if not limit or total <= limit:
        return sources
    return [
        replace(source, batches_per_epoch=max(1, int(source.batches_per_epoch * limit / total)))
        if source.dataset.regularisation_target
        else source
        for source in sources
    ]


def _unequal_weights(
    placed: Sequence[BucketedSample], buckets: Mapping[BucketSizes, np.ndarray]
) -> dict[BucketSizes, np.ndarray]:
    """Return the weights of the samples of each bucket in which they differ."""
    weights = {
        sizes: np.array([placed[index].sample.weight for index in bucket])
        for sizes, bucket in buckets.items()
    }
    return {sizes: own for sizes, own in weights.items() if np.ptp(own) > 0}


def _draw_by_weight(
    bucket: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return as many samples as the bucket has, shuffled, and which use of its sample each is.

    Systematic sampling: a sample of weight w is used either floor(e) or ceil(e) times, where e is
    w * len(bucket) / sum(weights), and e times on average over the rounds.
    """
    count = len(bucket)
    edges = np.cumsum(weights)
    # Evenly spaced points with one common random start; each takes the sample below which it lies.
    points = (np.arange(count) + rng.random()) * (edges[-1] / count)
    # The last point may round to the last edge.
    chosen = np.minimum(np.searchsorted(edges, points, side="right"), count - 1)
    # chosen is sorted, so the first place of a sample gives how many of its uses came before.
    uses = np.arange(count) - np.searchsorted(chosen, chosen)
    order = rng.permutation(count)
    return bucket[chosen[order]], uses[order].astype(np.int32)


def _batch_starts(sizes: BucketSizes, count: int, passes: int, batch_size: int) -> np.ndarray:
    """Return where the batches of one bucket begin, in `passes` passes over `count` samples.

    A batch crosses from one pass into the next, unless the crops have several sizes: then the
    samples have another size in the next pass.
    """
    if len(set(sizes)) == 1:
        return np.arange(0, count * passes, batch_size)
    return np.concatenate(
        [np.arange(0, count, batch_size) + number * count for number in range(passes)]
    )


def shuffle_round(source: BatchSource, seed: int, turn: int) -> ShuffledRound:
    """Return the round number `turn` of a dataset, a pure function of the seed.

    Each use of a sample takes its next crop, so that all of them are used equally often.
    """
    rng = np.random.Generator(np.random.Philox(seed_at(seed, "order", source.dataset.id, turn)))
    passes = source.passes
    visits, which_pass, spans = [], [], []
    begin = 0
    for sizes, bucket in source.buckets.items():
        count = len(bucket) * passes
        # Pass after pass, so that a batch holds a sample twice only where a small bucket leaves no
        # choice.
        if sizes in source.weights:
            for number in range(passes):
                samples, uses = _draw_by_weight(bucket, source.weights[sizes], rng)
                visits.append(samples)
                which_pass.append(number + uses * passes)  # every use has an address of its own
        else:
            visits += [rng.permutation(bucket) for _ in range(passes)]
            which_pass.append(np.repeat(np.arange(passes, dtype=np.int32), len(bucket)))
        starts = _batch_starts(sizes, len(bucket), passes, source.batch_size)
        ends = np.minimum(starts + source.batch_size, np.append(starts[1:], count))
        spans.append(np.stack([starts, ends], axis=1) + begin)
        begin += count
    order = rng.permutation(source.batches_per_round)
    repeat_indices = np.concatenate(which_pass)
    # Counted over all rounds; otherwise few repeats would never reach the later crops.
    crops = (turn * passes + repeat_indices) % source.crops
    return ShuffledRound(
        np.concatenate(visits) + crops.astype(np.int32),
        repeat_indices,
        np.concatenate(spans)[order],
    )


def batch_notices(source: BatchSource) -> list[str]:
    """Return what a user should know about batches that are not full, and about probability."""
    name, batch_size = source.dataset.id, source.batch_size
    notes = []
    short = 0
    for sizes, bucket in source.buckets.items():
        width, height = sizes[0]
        crosses = len(set(sizes)) == 1
        visits = len(bucket) * (source.passes if crosses else 1)
        short += (visits % batch_size > 0) * (1 if crosses else source.passes)
        if visits < batch_size:
            notes.append(
                f"{name}: bucket {width}x{height} has {count_of(visits, 'image')} per round, "
                f"fewer than a batch of {batch_size}; it is trained with a batch of {visits}"
            )
    if short > len(notes):
        notes.append(
            f"{name}: {short} of {source.batches_per_round} batches per round are smaller than "
            f"{batch_size}"
        )
    if source.batches_per_epoch < source.batches_per_round:
        reason = "regularisation_ratio" if source.dataset.regularisation_target else "probability"
        notes.append(
            f"{name}: {reason} gives {source.batches_per_epoch} of its "
            f"{source.batches_per_round} batches to an epoch"
        )
    return notes
