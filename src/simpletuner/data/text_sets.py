"""Entries that name caches: of text embeddings, with filters of captions, and of latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.data.dataset_config import DatasetConfig


@dataclass(frozen=True)
class TextSet:
    """An entry of dataset_type text_embeds. caption_filters: of the datasets that use it."""

    name: str
    is_default: bool
    folder: Path | None
    caption_filters: tuple[str, ...]


def default_text_set(text_sets: Sequence[TextSet]) -> tuple[TextSet | None, str]:
    """Return the set of datasets that name none, and what is wrong with the choice or ""."""
    default = [text_set for text_set in text_sets if text_set.is_default]
    is_unclear = len(default) > 1 or (len(text_sets) > 1 and not default)
    problem = 'several text_embeds entries: exactly one of them needs "default": true'
    return next(iter(default or text_sets), None), problem if is_unclear else ""


def named_latent_caches(entries: Sequence[Any]) -> frozenset[str]:
    """Return the ids that datasets name in image_embeds: entries of that type, if they say none."""
    named = {entry.get("image_embeds") for entry in entries if isinstance(entry, dict)}
    return frozenset(
        name
        for entry in entries
        if isinstance(entry, dict) and isinstance(name := entry.get("id"), str)
        if name in named and not entry.get("instance_data_dir")
    )


def with_filters_of_text_set(
    dataset: DatasetConfig,
    links: Mapping[str, Any],
    text_sets: Sequence[TextSet],
    default: TextSet | None,
) -> DatasetConfig:
    """Return the dataset with the filters of its text set where it has none of its own.

    links: id of a dataset -> its field text_embeds, which names a set other than the default.
    """
    by_name = {text_set.name: text_set for text_set in text_sets}
    text_set = by_name.get(str(links[dataset.id]), default)
    if text_set is None or dataset.caption_filters:
        return dataset
    return replace(dataset, caption_filters=text_set.caption_filters)
