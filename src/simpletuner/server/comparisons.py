"""Comparisons of runs: curves, differing settings, and the same prompts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simpletuner.events.run_history import RunHistory
from simpletuner.server.api_errors import abort
from simpletuner.server.run_reader import RunReader
from simpletuner.server.run_service import RunService
from simpletuner.server.schemas.library import (
    ComparedImages,
    ComparedRun,
    ComparedSetting,
    Comparison,
    RunEvaluation,
    RunScore,
)
from simpletuner.server.schemas.runs import RunImage

MAX_COMPARED_RUNS = 8
MAX_POINTS = 600  # steps of each curve
# They differ between any two runs and say nothing about how these were trained.
LOCATION_OPTIONS = ("output_dir", "data_backend_config", "cache_dir", "user_prompt_library")


def compare_runs(runs: RunService, ids: Sequence[str]) -> Comparison:
    """Compare runs in the given order.

    Raises ApiError: 404 for an unknown run, 422 for less than two or too many runs.
    """
    ids = list(dict.fromkeys(ids))
    if not 2 <= len(ids) <= MAX_COMPARED_RUNS:
        abort(422, f"choose from 2 to {MAX_COMPARED_RUNS} runs", "run")
    summaries = [runs.summary(id) for id in ids]
    readers = [runs.find_reader(id) or abort(409, "a run has not started yet") for id in ids]
    compared = [
        ComparedRun(
            summary=summary,
            metrics=reader.metrics(MAX_POINTS),
            evaluations=_evaluations(reader.summary.history),
            scores=_scores(reader.summary.history),
        )
        for summary, reader in zip(summaries, readers, strict=True)
    ]
    return Comparison(
        runs=compared,
        settings=_differing_settings(readers),
        images=_common_images([runs.list_images(id) for id in ids]),
    )


def _evaluations(history: RunHistory) -> list[RunEvaluation]:
    return [
        RunEvaluation(
            step=event.step,
            split=event.split,
            dataset=event.dataset,
            loss=event.loss,
            change=event.change,
            change_se=event.change_se,
            best=event.best,
        )
        for event in sorted(history.evaluations.values(), key=lambda event: event.step)
        if event.loss == event.loss
    ]


def _scores(history: RunHistory) -> list[RunScore]:
    return [
        RunScore(
            step=event.step,
            metric=event.metric,
            name=name,
            value=value,
            error=error,
            unit=event.unit,
        )
        for event in sorted(history.scores.values(), key=lambda event: event.step)
        for name, (value, error, _) in event.rates.items()
    ]


def _differing_settings(readers: Sequence[RunReader]) -> list[ComparedSetting]:
    configs = [reader.config() for reader in readers]
    names = sorted(set().union(*configs) - set(LOCATION_OPTIONS))
    rows = [(name, [config.get(name) for config in configs]) for name in names]
    return [
        ComparedSetting(name=name, values=values)
        for name, values in rows
        if any(value != values[0] for value in values)
    ]


def _common_images(images: Sequence[Sequence[RunImage]]) -> list[ComparedImages]:
    """Return the images by prompt, size and seed; those of at least two runs come first."""
    rows: dict[tuple[Any, ...], list[list[RunImage]]] = {}
    for at, own_images in enumerate(images):
        for image in own_images:
            weights = "trained" if image.weights == "base" else image.weights
            key = (image.prompt, image.seed, image.width_px, image.height_px, weights)
            rows.setdefault(key, [[] for _ in images])[at].append(image)
    ordered = sorted(rows.items(), key=lambda row: -sum(bool(part) for part in row[1]))
    return [
        ComparedImages(
            prompt=prompt,
            seed=seed,
            width_px=width,
            height_px=height,
            weights=weights,
            images=parts,
        )
        for (prompt, seed, width, height, weights), parts in ordered
        if sum(bool(part) for part in parts) > 1
    ]
