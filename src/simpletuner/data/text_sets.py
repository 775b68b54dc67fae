"""Entries of dataset_type text_embeds: cache of text embeddings, and filters of captions."""

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
