"""The dataset file (multidatabackend.json): a list of datasets, checked completely."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.config import jsonc, option_values
from simpletuner.config.constraints import check_sizes_and_captions
from simpletuner.config.documents import read_document
from simpletuner.config.environment import expand_placeholders
from simpletuner.config.model_families import DEFAULT_FAMILY
from simpletuner.config.option_catalog import Option
from simpletuner.config.option_values import SectionT, did_you_mean, validate_section
from simpletuner.config.paths import find_path
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig, DatasetFile
from simpletuner.data.dataset_fields import (
    ALL_FIELD_NAMES,
    CACHE_DATASET_TYPES,
    CACHE_FIELDS,
    CACHE_STORAGES,
    COMMON_FIELDS,
    FIELD_ALIASES,
    IMAGE_FIELDS,
    NO_PAIRS_REASON,
    REFUSED_FIELDS,
    RUN_OPTION_FIELDS,
    UNNEEDED_FIELDS,
    CacheDatasetFields,
    ImageDatasetFields,
    generates_masks,
    is_harmless,
)
from simpletuner.data.dataset_objects import read_dataset_objects
from simpletuner.data.ineffective_fields import (
    find_ineffective_fields,
    find_ineffective_run_options,
    format_unneeded,
)
from simpletuner.data.mask_datasets import (
    MaskDataset,
    chosen_mask_dataset,
    link_mask_datasets,
    pair_ids,
    read_mask_dataset,
)
from simpletuner.data.source_config import SourceConfig, read_source, unused_fields
from simpletuner.data.text_sets import (
    TextSet,
    default_text_set,
    named_latent_caches,
    with_filters_of_text_set,
)
from simpletuner.data.variation_fields import read_filter_field
from simpletuner.errors import ConfigError, Problem

EXAMPLE_DATASET_FILE = '[{"id": "photos", "instance_data_dir": "datasets/photos"}]'
PATH_FIELDS = ("cache_dir", "instance_data_dir")  # the fields that may have placeholders


def read_dataset_file(
    path: Path,
    options: DataOptions,
    environ: Mapping[str, str] | None = None,
    output_dir: str = "",
) -> DatasetFile:
    """Read and check a dataset file.

    options: the values of fields that a dataset does not set. environ: for {env:NAME} in texts;
    None is the environment of the process. output_dir: for {output_dir} in paths. Relative folders
    are looked for in the folder of the file, then in the working directory. Raises ConfigError with
    every problem of the file.
    """
    if not os.path.lexists(path):
        message = f"no such dataset file; the smallest possible one is {EXAMPLE_DATASET_FILE}"
        raise ConfigError([Problem(str(path), message)])
    document = read_document(path, path.name)
    reader = _DatasetFileReader(
        path.resolve().parent, document.value, document.location_of, options, environ, output_dir
    )
    datasets = reader.read_entries()
    if reader.problems:
        raise ConfigError(reader.problems)
    return datasets


def try_read_datasets(
    entries: Sequence[Any], folder: Path, options: DataOptions
) -> tuple[DatasetFile, tuple[Problem, ...]]:
    """Check datasets that are in no file yet; the location of a problem is "photos.resolution".

    folder: where relative folders are looked for first. Placeholders are not read.
    """

    def locate(path: jsonc.JsonPath) -> str:
        if not path:
            return ""
        index, *inside = (str(part) for part in path)
        entry = entries[int(index)]
        name = entry.get("id") if isinstance(entry, dict) else None
        return ".".join((name if isinstance(name, str) and name else f"[{index}]", *inside))

    reader = _DatasetFileReader(folder, list(entries), locate, options, {})
    return reader.read_entries(), tuple(reader.problems)


@dataclass
class _DatasetFileReader:
    """One pass over one dataset file, which collects problems and notices.

    dataset_values: the effective values of each dataset of images.
    """

    base_folder: Path
    entries: Any
    locate: Callable[[jsonc.JsonPath], str]
    run_options: DataOptions
    environ: Mapping[str, str] | None
    output_dir: str = ""
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    dataset_values: list[dict[str, Any]] = field(default_factory=list)
    pair_ids: frozenset[str] = frozenset()
    unneeded: dict[str, list[str]] = field(default_factory=dict)

    def add_problem(self, message: str, *path: str | int) -> None:
        self.problems.append(Problem(self.locate(path), message))

    def read_entries(self) -> DatasetFile:
        if not isinstance(self.entries, list):
            self.add_problem(
                f"the file must hold a list of datasets, such as {EXAMPLE_DATASET_FILE}"
            )
            return DatasetFile((), (), None)
        self.pair_ids = pair_ids(self.entries)
        latent_caches = named_latent_caches(self.entries)
        located: list[tuple[int, DatasetConfig]] = []
        masks: dict[str, MaskDataset] = {}
        indexes: dict[str, int] = {}
        text_sets: list[TextSet] = []
        links: dict[str, Any] = {}
        for at, entry in enumerate(self.entries):
            if not isinstance(entry, dict):
                self.add_problem("a dataset must be an object of fields, {...}", at)
                continue
            name = self.read_id(at, entry, indexes)
            given = {key: entry[key] for key in COMMON_FIELDS if entry.get(key) not in (None, "")}
            if name in latent_caches and "dataset_type" not in given:
                given["dataset_type"] = "image_embeds"
            self.replace_cache_storage(name, given)
            common = self.read_fields(at, name, given, COMMON_FIELDS)
            if common.get("disabled") or common.get("disable") or common.keys() != given.keys():
                continue
            kind = common.get("dataset_type", "image")
            if kind in ("image", "eval"):
                fields = self.read_fields(at, name, entry, IMAGE_FIELDS)
                dataset = self.build_dataset(at, name, kind, fields, common.get("type", "local"))
                located += [(at, dataset)] if dataset is not None else []
                links[name] = entry.get("text_embeds")
            elif name in self.pair_ids:
                self.notices.append(f"{name} is not read: {NO_PAIRS_REASON}")
            elif kind == "conditioning":
                masks |= read_mask_dataset(self, at, name, entry, common.get("type", "local"))
            else:
                text_sets += self.read_cache(at, name, kind, entry)
        self.notices = [*format_unneeded(self.unneeded), *self.notices]
        datasets = link_mask_datasets(self, located, masks)
        self.check_trained_datasets(datasets)
        self.notices += find_ineffective_run_options(self.run_options, self.dataset_values)
        default, problem = default_text_set(text_sets)
        if problem:
            self.add_problem(problem)
        train, held_out = (
            tuple(
                with_filters_of_text_set(dataset, links, text_sets, default)
                for dataset in datasets
                if dataset.dataset_type == kind
            )
            for kind in ("image", "eval")
        )
        folder = None if default is None else default.folder
        return DatasetFile(train, held_out, folder, tuple(self.notices))

    def read_cache(self, at: int, name: str, kind: str, entry: dict[str, Any]) -> list[TextSet]:
        """Return the text set of an entry of text_embeds; nothing for other caches."""
        known = {key: raw for key, raw in entry.items() if not key.startswith("aws_")}
        fields = self.read_fields(at, name, known, CACHE_FIELDS)
        cache = self.validate_fields(at, name, CacheDatasetFields, fields)
        folder = self.resolve_folder(cache.cache_dir) if cache.cache_dir else None
        if kind != "text_embeds":
            if folder is not None:
                reason = UNNEEDED_FIELDS["image_embeds"]
                self.notices.append(f"{name}.cache_dir is not used: {reason}")
            return []
        filters: tuple[str, ...] = ()
        try:
            filters = read_filter_field(cache.caption_filter_list, self.resolve_folder)
        except ConfigError as error:
            self.add_problem(f"{name}.caption_filter_list: {error}", at, "caption_filter_list")
        return [TextSet(name, cache.default, folder, filters)]

    def check_trained_datasets(self, datasets: list[DatasetConfig]) -> None:
        """Add a problem where nothing is trained on, or nothing in the first step."""
        trained = [dataset for dataset in datasets if dataset.dataset_type == "image"]
        if not trained and not self.problems:
            self.add_problem(
                "no dataset of dataset_type image is enabled, so there is nothing to train on"
            )
        elif trained and not any(dataset.active.holds(0, 0) for dataset in trained):
            self.add_problem("no dataset is active at first: one needs start_step 0, start_epoch 1")

    def replace_cache_storage(self, name: str, given: dict[str, Any]) -> None:
        """Read a cache in memory or in an object store as one in files of this machine."""
        if given.get("dataset_type") in CACHE_DATASET_TYPES and given.get("type") in CACHE_STORAGES:
            self.notices.append(
                f"{name}.type {given['type']} is not used: caches are files of this machine; "
                "cache_remote in the config copies them to an object store"
            )
            given["type"] = "local"

    def read_id(self, at: int, entry: dict[str, Any], indexes: dict[str, int]) -> str:
        name = entry.get("id")
        if not isinstance(name, str) or not name.strip():
            self.add_problem('"id" is missing: a name for the dataset, unique in this file', at)
            return f"[{at}]"
        if re.search(r"[/\\\x00-\x1f\x7f]", name):
            self.add_problem(
                f"id = {json.dumps(name)}: slashes and control characters are not allowed", at, "id"
            )
        if name in indexes:
            first = self.locate((indexes[name], "id"))
            self.add_problem(f"id = {json.dumps(name)} is already used at {first}", at, "id")
        indexes.setdefault(name, at)
        return name

    def read_fields(
        self, at: int, name: str, entry: dict[str, Any], table: Mapping[str, Option]
    ) -> dict[str, Any]:
        """Return the values of the fields in `table`.

        null and blank texts are the same as not given. Unknown, refused and misplaced fields are
        reported.
        """
        values: dict[str, Any] = {}
        for key, raw in entry.items():
            if key in COMMON_FIELDS and table is not COMMON_FIELDS:
                continue
            key = FIELD_ALIASES.get(key, key)
            if key not in ALL_FIELD_NAMES:
                hint = did_you_mean(key, ALL_FIELD_NAMES)
                self.add_problem(f"{name}.{key}: unknown field{hint}", at, key)
            elif raw in (None, ""):
                continue
            elif key in table:
                self.read_value(at, name, table[key], raw, values)
            elif key in REFUSED_FIELDS:
                if not is_harmless(key, raw):
                    self.add_problem(
                        f"{name}.{key} is not supported: {REFUSED_FIELDS[key]}", at, key
                    )
            elif key == "conditioning" and generates_masks(raw):
                self.add_problem(f"{name}.{key}: masks are read from files, not made", at, key)
            elif key in UNNEEDED_FIELDS and not is_harmless(key, raw):
                self.unneeded.setdefault(key, []).append(name)
            elif key not in UNNEEDED_FIELDS:
                self.add_problem(
                    f"{name}.{key} is not a field of datasets with this dataset_type", at, key
                )
        return values

    def read_value(
        self, at: int, name: str, option: Option, raw: Any, values: dict[str, Any]
    ) -> None:
        """Add one value to `values`, or a problem."""
        try:
            expanded = expand_placeholders(raw, self.environ)
            if option.name in PATH_FIELDS and isinstance(expanded, str):
                for placeholder, value in {
                    "{model_family}": DEFAULT_FAMILY,
                    "{output_dir}": self.output_dir,
                    "{id}": name,
                }.items():
                    expanded = expanded.replace(placeholder, value)
            values[option.name] = option_values.parse_value(option, expanded)
        except option_values.InvalidOptionValue as error:
            assignment = option_values.format_assignment(option, raw)
            self.add_problem(f"{name}.{assignment}: {error}", at, option.name)
        except ConfigError as error:
            self.add_problem(f"{name}.{option.name}: {error}", at, option.name)

    def validate_fields(
        self, at: int, name: str, model: type[SectionT], given: dict[str, Any]
    ) -> SectionT:
        return validate_section(
            model, given, lambda key, message: self.add_problem(f"{name}.{message}", at, key)
        )

    def build_dataset(
        self, at: int, name: str, kind: str, given: dict[str, Any], storage: str
    ) -> DatasetConfig | None:
        before = len(self.problems)
        if isinstance(given.get("instance_prompt"), str):
            given["instance_prompt"] = [given["instance_prompt"]]
        overrides = {key: given[key] for key in RUN_OPTION_FIELDS if key in given}
        image_fields = {key: value for key, value in given.items() if key not in overrides}
        fields = self.validate_fields(at, name, ImageDatasetFields, image_fields)
        own = self.validate_fields(
            at, name, DataOptions, {**self.run_options.model_dump(), **overrides}
        )
        if overrides:
            for key, reason in check_sizes_and_captions(own):
                self.add_problem(f"{name}.{key}: {reason}", at, key)
        self.report_ineffective_fields(
            at, name, {"dataset_type": kind, **dict(own), **dict(fields)}, given
        )
        source = self.locate_source(at, name, storage, fields, own) or SourceConfig()
        objects = read_dataset_objects(
            kind,
            fields,
            own,
            source,
            self.resolve_folder,
            lambda key, error: self.add_problem(f"{name}.{key}: {error}", at, key),
        )
        masks, problem = chosen_mask_dataset(name, fields.conditioning_data, self.pair_ids)
        if problem:
            self.add_problem(problem, at, "conditioning_data")
        run_prompt = (self.run_options.instance_prompt or "").strip()
        dataset = DatasetConfig(
            id=name,
            dataset_type=kind,
            instance_data_dir=source.folder,
            caption_strategy=own.caption_strategy,
            instance_prompts=tuple(fields.instance_prompt or filter(None, [run_prompt])),
            prepend_instance_prompt=own.prepend_instance_prompt,
            only_instance_prompt=own.only_instance_prompt,
            disable_multiline_split=fields.disable_multiline_split,
            repeats=fields.repeats,
            probability=fields.probability,
            max_num_samples=fields.max_num_samples,
            type=storage,
            caption_weights=tuple(fields.caption_weights or ()),
            timestep_sampling_offset=fields.timestep_sampling_offset,
            conditioning_data=masks,
            alpha_mask=fields.alpha_mask,
            regularisation_target=(
                fields.regularisation_target if fields.is_regularisation_data else ""
            ),
            **vars(objects),
            store=source.store,
            hub=source.hub,
            table=source.table,
        )
        uses_prompt = own.caption_strategy == "instanceprompt" or own.prepend_instance_prompt
        if (uses_prompt or own.only_instance_prompt) and not dataset.instance_prompts:
            self.add_problem(f"{name}.instance_prompt is missing: the captions need it", at)
        return dataset if len(self.problems) == before else None

    def locate_source(
        self, at: int, name: str, storage: str, fields: ImageDatasetFields, own: DataOptions
    ) -> SourceConfig | None:
        """Return where the images are; None after a problem."""
        given = self.entries[at]
        for key in unused_fields(storage, given):
            self.notices.append(f"{name}.{key} has no effect with type {storage}")
        try:
            return read_source(storage, fields, own, self.resolve_folder)
        except ConfigError as error:
            for problem in error.problems:
                if given.get(problem.location) and problem.message.startswith("is missing"):
                    continue  # it was given, and the problem of its value is already reported
                where = (at, problem.location) if problem.location in given else (at,)
                self.add_problem(f"{name}.{problem.location} {problem.message}", *where)
            return None

    def report_ineffective_fields(
        self, at: int, name: str, values: dict[str, Any], given: Mapping[str, Any]
    ) -> None:
        """Report the given fields that have no effect with the values of the others."""
        self.dataset_values.append(values)
        for key, error, notice in find_ineffective_fields(values, given):
            if error is not None:
                self.add_problem(f"{name}.{key} {error}", at, key)
            else:
                self.notices.append(f"{name}.{notice}")

    def resolve_folder(self, written: str) -> Path:
        """Return the absolute path.

        A folder next to the dataset file comes before one in the working directory.
        """
        existing, tried = find_path(written, self.base_folder, Path.cwd())
        return Path(existing or tried[-1])
