"""Hold out a part of the training images: which, from the options and from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner.atomic_io import write_atomically
from simpletuner.bounded_files import read_bounded_text
from simpletuner.cache.content_hashes import ContentHashes
from simpletuner.config.schema import DataOptions, RunConfig
from simpletuner.config.tuning_constraints import NO_HELD_OUT_IMAGES
from simpletuner.data import held_out_split, near_duplicates
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.data.held_out_split import SplitRequest
from simpletuner.data.sample_types import BucketedSample
from simpletuner.errors import DataError
from simpletuner.events.event_types import Emit, NoticeIssued, WarningIssued
from simpletuner.events.formatting import count_of
from simpletuner.events.stage_reporter import StageReporter
from simpletuner.training.resume import ResumePoint
from simpletuner.training.world import World

SPLIT_FILE = "held_out.json"  # in the cache folder: the last choice, which decoded every image
SPLIT_OPTIONS = ("validation_split", "validation_fold")
FORWARDS_PER_STEP = 3  # a training step costs about three forward passes
MAX_LISTED = 5


def choose_held_out_ids(
    run: RunConfig,
    placed: Sequence[BucketedSample],
    has_eval_dataset: bool,
    cache_root: Path,
    resume_point: ResumePoint | None,
    world: World,
    emit: Emit,
) -> frozenset[str]:
    """Return the ids of the training samples to hold out; every process gets the same.

    placed: the usable samples of the training datasets. A resumed run holds out what its checkpoint
    names, which is nothing for a checkpoint of an earlier version, unless the options changed.
    """
    saved = saved_split(run, resume_point)
    if saved is not None:
        # Images that were deleted since are not held out any more.
        names = {item.sample.id for item in placed}
        return frozenset(name for name in saved if name in names)
    request = held_out_split.split_request(
        run.tuning.validation_split, run.tuning.validation_fold, len(placed), has_eval_dataset
    )
    if request is None or (run.validation.eval_loss_disable and not is_requested(run)):
        if not has_eval_dataset and run.tuning.validation_split is None:
            _offer(run, len(placed), emit)
        return frozenset()
    # Only the main process decodes: rounding of another CPU could choose other images.
    chosen: list[str] | None = None
    if world.is_main:
        chosen = _choose(placed, request, run.data, cache_root, emit)
    chosen = world.broadcast_json(chosen)
    _report(run, placed, chosen, request, emit)
    return frozenset(chosen)


def taught_samples(backends: DatasetFile, placed: Iterable[BucketedSample]) -> list[BucketedSample]:
    """Return the samples that may be held out: once each, and none of a regularisation dataset."""
    taught = {dataset.id for dataset in backends.train if not dataset.regularisation_target}
    return [item for item in placed if item.sample.dataset in taught and item.crop_index == 0]


def require_held_out_images(
    run: RunConfig, backends: DatasetFile, placed: Iterable[BucketedSample]
) -> None:
    """Raise DataError where early_stopping has nothing to decide by, before images are encoded."""
    if not run.tuning.early_stopping or backends.eval:
        return
    tuning, count = run.tuning, len(taught_samples(backends, placed))
    fold = tuning.validation_fold
    if held_out_split.split_request(tuning.validation_split, fold, count, False) is None:
        raise DataError(NO_HELD_OUT_IMAGES)


def is_requested(run: RunConfig) -> bool:
    """Return whether an option asks for held-out images, rather than the default."""
    return bool(run.tuning.validation_split) or run.tuning.validation_fold is not None


def saved_split(run: RunConfig, resume_point: ResumePoint | None) -> Sequence[str] | None:
    """Return the held-out ids of the checkpoint; None where there is none to keep to."""
    if resume_point is None:
        return None
    config: Mapping[str, Any] = resume_point.state["config"]  # type: ignore[assignment]
    if any(config.get(name) != getattr(run.tuning, name) for name in SPLIT_OPTIONS):
        return None
    return [str(name) for name in resume_point.state.get("held_out", ())]  # type: ignore[attr-defined]


def _choose(
    placed: Sequence[BucketedSample],
    request: SplitRequest,
    options: DataOptions,
    cache_root: Path,
    emit: Emit,
) -> list[str]:
    """Return the ids to hold out; images are decoded only where the last choice does not fit."""
    hashes = ContentHashes(cache_root, emit)
    try:
        contents = [hashes.hash_file(item.sample.file) for item in placed]
    finally:
        hashes.close()
    ids = [item.sample.id for item in placed]
    key = held_out_split.split_key(ids, contents, request)
    path = cache_root / SPLIT_FILE
    stored = _read_stored(path)
    if stored.get("key") == key:
        return list(stored["held_out"])
    with StageReporter(emit, "compare", len(placed), "images") as stage:
        fingerprints = near_duplicates.fingerprint_samples(
            [item.sample for item in placed], options, stage.advance
        )
        groups = held_out_split.group_look_alikes(contents, fingerprints)
        datasets = [item.sample.dataset for item in placed]
        chosen = [ids[at] for at in held_out_split.choose_held_out(groups, datasets, request)]
        stage.summary = f"{len(chosen)} held out"
    write_atomically(path, json.dumps({"key": key, "held_out": chosen}) + "\n")
    return chosen


def _read_stored(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(read_bounded_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) and "held_out" in stored else {}


def _report(
    run: RunConfig,
    placed: Sequence[BucketedSample],
    chosen: Sequence[str],
    request: SplitRequest,
    emit: Emit,
) -> None:
    if not chosen:
        emit(
            WarningIssued(
                "no image could be held out: those that can be spared look like images that are "
                "trained on; add a dataset with dataset_type eval"
            )
        )
        return
    named = ", ".join(ascii(name)[1:-1] for name in chosen[:MAX_LISTED])
    more = f" and {len(chosen) - MAX_LISTED} more" if len(chosen) > MAX_LISTED else ""
    origin = (
        f"validation_fold {run.tuning.validation_fold}"
        if request.folds
        else f"validation_split {run.tuning.validation_split:g}"
        if run.tuning.validation_split
        else f"the default from {held_out_split.DEFAULT_FROM_IMAGES} images on; "
        "validation_split 0 trains on all"
    )
    emit(
        NoticeIssued(
            f"held out {count_of(len(chosen), 'image')} of {len(placed)} ({origin}): {named}{more}"
        )
    )
    if not request.folds and len(chosen) < request.count:
        emit(
            WarningIssued(
                f"{request.count} images were to be held out; the others look like images that "
                "are trained on"
            )
        )


def _offer(run: RunConfig, count: int, emit: Emit) -> None:
    """Say what holding images out would cost, where nothing is held out."""
    offered = max(1, round(count * held_out_split.OFFERED_SHARE))
    if count - offered < 1 or run.validation.eval_loss_disable:
        return
    forwards = 2 * min(offered, run.validation.num_eval_images) * run.validation.eval_sigma_count
    steps = forwards / (FORWARDS_PER_STEP * run.training.train_batch_size)
    emit(
        NoticeIssued(
            f"no images are held out, so nothing says when to stop. validation_split "
            f"{held_out_split.OFFERED_SHARE:g} would measure that: {offered} of "
            f"{count_of(count, 'image')} would not be trained on, and each measurement takes "
            f"about as long as {count_of(max(1, round(steps)), 'training step')}"
        )
    )
