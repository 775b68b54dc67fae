"""Datasets of masks in a dataset file, and the datasets of images that name them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from simpletuner.config.option_catalog import Option
from simpletuner.config.option_values import SectionT
from simpletuner.data.dataset_config import DatasetConfig
from simpletuner.data.dataset_fields import (
    IMAGE_FIELDS,
    MASK_FIELDS,
    PAIR_TYPES,
    MaskDatasetFields,
)
from simpletuner.data.source_config import find_folder, is_address
from simpletuner.errors import ConfigError, Problem

LOCAL_TYPES = ("local", "webdataset")


@dataclass(frozen=True)
class MaskDataset:
    """A dataset of masks. position: in the file. source: the images it says it belongs to."""

    position: int
    config: DatasetConfig
    source: str | None


class DatasetReader(Protocol):
    """The parts of the reader of a dataset file that reading masks needs."""

    problems: list[Problem]
    notices: list[str]

    def add_problem(self, message: str, *path: str | int) -> None: ...

    def read_fields(
        self, at: int, name: str, entry: dict[str, Any], table: Mapping[str, Option]
    ) -> dict[str, Any]: ...

    def validate_fields(
        self, at: int, name: str, model: type[SectionT], given: dict[str, Any]
    ) -> SectionT: ...

    def resolve_folder(self, written: str) -> Path: ...


def read_mask_dataset(
    reader: DatasetReader, at: int, name: str, entry: Mapping[str, Any], storage: str
) -> dict[str, MaskDataset]:
    """Return a dataset of masks by its id; nothing, and problems, where it cannot be used."""
    before = len(reader.problems)
    unused = [field for field in entry if field in IMAGE_FIELDS and field not in MASK_FIELDS]
    if unused:
        reader.notices.append(
            f"{name}: not used: {', '.join(unused)}; masks follow the crops of their images"
        )
    known = {field: raw for field, raw in entry.items() if field not in unused}
    given = reader.read_fields(at, name, known, MASK_FIELDS)
    fields = reader.validate_fields(at, name, MaskDatasetFields, given)
    if fields.conditioning_type is None and len(reader.problems) == before:
        reader.add_problem(
            f'{name}.conditioning_type is missing: write "conditioning_type": "mask"', at
        )
    folder = Path()
    if storage not in LOCAL_TYPES or is_address(fields.instance_data_dir):
        reader.add_problem(f"{name}: masks are read from folders and tar files of this machine", at)
    else:
        try:
            folder = find_folder(fields.instance_data_dir, reader.resolve_folder)
        except ConfigError as error:
            for problem in error.problems:
                reader.add_problem(f"{name}.{problem.location} {problem.message}", at)
    if len(reader.problems) > before:
        return {}
    config = DatasetConfig(name, "conditioning", folder, type=storage)
    return {name: MaskDataset(at, config, fields.source_dataset_id)}


def pair_ids(entries: Sequence[Any]) -> frozenset[str]:
    """Return the ids of entries whose images belong to others in another way than masks do."""
    return frozenset(
        str(entry.get("id"))
        for entry in entries
        if isinstance(entry, dict) and entry.get("conditioning_type") in PAIR_TYPES
        if entry.get("dataset_type") == "conditioning"
    )


def chosen_mask_dataset(
    name: str, given: str | Sequence[str] | None, pairs: frozenset[str] = frozenset()
) -> tuple[str | None, str]:
    """Return the one dataset that conditioning_data names, and why it cannot be used or "".

    pairs: datasets that are not read.
    """
    names = [given] if isinstance(given, str) else list(given or ())
    names = [chosen for chosen in names if chosen not in pairs]
    if len(names) > 1:
        shown = json.dumps(names, ensure_ascii=False)
        return None, f"{name}.conditioning_data = {shown}: an image has one mask; name one dataset"
    return (names[0] if names else None), ""


def link_mask_datasets(
    reader: DatasetReader,
    datasets: Sequence[tuple[int, DatasetConfig]],
    masks: Mapping[str, MaskDataset],
) -> list[DatasetConfig]:
    """Return the datasets of images, each with its dataset of masks.

    datasets: with their positions in the file. Nothing is linked in a file that has problems.
    """
    if reader.problems:
        return [dataset for _, dataset in datasets]
    for position, dataset in datasets:
        if dataset.alpha_mask and not dataset.has_folder:
            reader.add_problem(
                f"{dataset.id}.alpha_mask needs images of this machine: whether remote ones have "
                "transparency is not known before they are decoded",
                position,
                "alpha_mask",
            )
    linked = []
    used: set[str] = set()
    for position, dataset in datasets:
        chosen = dataset.conditioning_data
        if chosen is None:
            linked.append(dataset)
            continue
        mask_dataset = masks.get(chosen)
        used.add(chosen)
        where = (position, "conditioning_data")
        shown = f"{dataset.id}.conditioning_data = {json.dumps(chosen, ensure_ascii=False)}"
        if mask_dataset is None:
            known = ", ".join(masks) or "none"
            reader.add_problem(
                f"{shown}: there is no dataset of this id with dataset_type conditioning (there "
                f"are: {known})",
                *where,
            )
            continue
        if dataset.alpha_mask:
            reader.add_problem(f"{shown}: alpha_mask is given too; use one of them", *where)
        if mask_dataset.source not in (None, dataset.id):
            reader.add_problem(
                f"{chosen}.source_dataset_id = {json.dumps(mask_dataset.source)}, but "
                f"{dataset.id} names this dataset in conditioning_data; use the same name, or "
                "leave it out",
                mask_dataset.position,
                "source_dataset_id",
            )
        linked.append(replace(dataset, masks=mask_dataset.config))
    for name in masks.keys() - used:
        reader.add_problem(
            f"no dataset of images has conditioning_data {json.dumps(name)}, so these masks would "
            "not be used",
            masks[name].position,
        )
    return linked
