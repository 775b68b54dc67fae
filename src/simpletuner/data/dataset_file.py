"""The dataset file (multidatabackend.json): a list of sets, every field checked, all problems at once."""

from __future__ import annotations

import dataclasses
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
from simpletuner.config.option_catalog import Option
from simpletuner.config.option_values import SectionT, did_you_mean, validate_section
from simpletuner.config.paths import find_path
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetConfig, DatasetFile
from simpletuner.data.dataset_fields import (
    ALL_FIELD_NAMES,
    CACHE_FIELDS,
    COMMON_FIELDS,
    HARMLESS_VALUES,
    IMAGE_FIELDS,
    REFUSED_FIELDS,
    RUN_OPTION_FIELDS,
    UNNEEDED_FIELDS,
    CacheDatasetFields,
    ImageDatasetFields,
)
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.errors import ConfigError, Problem

EXAMPLE_DATASET_FILE = '[{"id": "photos", "instance_data_dir": "datasets/photos"}]'


def read_dataset_file(
    path: Path, options: DataOptions, environ: Mapping[str, str] | None = None
) -> DatasetFile:
    """Read and check a dataset file.

    options: what holds where a set has no field of its own. environ: for {env:NAME} in texts; None is the
    environment of the process. Folders are looked for beside the file, then in the working directory.
    Raises ConfigError with every problem of the file.
    """
    if not os.path.lexists(path):
        raise ConfigError(
            [
                Problem(
                    str(path), f"no such dataset file; the smallest one is {EXAMPLE_DATASET_FILE}"
                )
            ]
        )
    document = read_document(path, path.name)
    reader = _DatasetFileReader(
        path.resolve().parent, document.value, document.location_of, options, environ
    )
    backends = reader.read_entries()
    if reader.problems:
        raise ConfigError(reader.problems)
    return backends


def try_read_datasets(
    sets: Sequence[Any], folder: Path, options: DataOptions
) -> tuple[DatasetFile, tuple[Problem, ...]]:
    """As `read_backends`, of sets that are in no file yet: `where` is "photos.resolution".

    folder: where relative folders are looked for first. No placeholder is read.
    """

    def where(path: jsonc.JsonPath) -> str:
        at, *inside = (str(part) for part in path) if path else ("",)
        entry = sets[int(at)] if at else None
        name = entry.get("id") if isinstance(entry, dict) else None
        return (
            ".".join((name if isinstance(name, str) and name else f"[{at}]", *inside)) if at else ""
        )

    reader = _DatasetFileReader(folder, list(sets), where, options, {})
    return reader.read_entries(), tuple(reader.problems)


@dataclass
class _DatasetFileReader:
    """One pass over one file; problems and notes gather here."""

    base_folder: Path
    entries: Any
    locate: Callable[[jsonc.JsonPath], str]
    run_options: DataOptions
    environ: Mapping[str, str] | None
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def add_problem(self, what: str, *where: str | int) -> None:
        self.problems.append(Problem(self.locate(where), what))

    def read_entries(self) -> DatasetFile:
        if not isinstance(self.entries, list):
            self.add_problem(f"a list of datasets is expected, such as {EXAMPLE_DATASET_FILE}")
            return DatasetFile((), (), None)
        found: list[DatasetConfig] = []
        ids: dict[str, int] = {}
        text_caches: list[tuple[bool, Path | None]] = []
        for at, entry in enumerate(self.entries):
            if not isinstance(entry, dict):
                self.add_problem("a dataset is expected: fields in { }", at)
                continue
            name = self.read_id(at, entry, ids)
            given = {key: entry[key] for key in COMMON_FIELDS if entry.get(key) not in (None, "")}
            shared = self.read_fields(at, name, given, COMMON_FIELDS)
            if shared.get("disabled") or shared.get("disable") or shared.keys() != given.keys():
                continue
            kind = shared.get("dataset_type", "image")
            if kind in ("image", "eval"):
                dataset = self.build_dataset(
                    at, name, kind, self.read_fields(at, name, entry, IMAGE_FIELDS)
                )
                found += [dataset] if dataset is not None else []
            else:
                cache = self.validate_fields(
                    at, name, CacheDatasetFields, self.read_fields(at, name, entry, CACHE_FIELDS)
                )
                folder = self.resolve_folder(cache.cache_dir) if cache.cache_dir else None
                if kind == "text_embeds":
                    text_caches.append((cache.default, folder))
                elif folder is not None:
                    self.notices.append(
                        f"{name}.cache_dir is not used: {UNNEEDED_FIELDS['image_embeds']}"
                    )
        train = tuple(dataset for dataset in found if dataset.dataset_type == "image")
        if not train and not self.problems:
            self.add_problem(
                "no set of dataset_type image is enabled, so there is nothing to train on"
            )
        return DatasetFile(
            train,
            tuple(dataset for dataset in found if dataset.dataset_type == "eval"),
            self.choose_text_cache(text_caches),
            tuple(self.notices),
        )

    def choose_text_cache(self, caches: list[tuple[bool, Path | None]]) -> Path | None:
        default = [folder for is_default, folder in caches if is_default]
        if len(default) > 1 or (len(caches) > 1 and not default):
            self.add_problem('of several text_embeds sets exactly one needs "default": true')
        return (default or [folder for _, folder in caches] or [None])[0]

    def read_id(self, at: int, entry: dict[str, Any], ids: dict[str, int]) -> str:
        name = entry.get("id")
        if not isinstance(name, str) or not name.strip():
            self.add_problem('"id" is missing: a name for the dataset, unique in this file', at)
            return f"[{at}]"
        if re.search(r"[/\\\x00-\x1f\x7f]", name):
            self.add_problem(
                f"id = {json.dumps(name)}: slashes and control characters are not allowed", at, "id"
            )
        if name in ids:
            first = self.locate((ids[name], "id"))
            self.add_problem(f"id = {json.dumps(name)} is already used at {first}", at, "id")
        ids.setdefault(name, at)
        return name

    def read_fields(
        self, at: int, name: str, entry: dict[str, Any], table: Mapping[str, Option]
    ) -> dict[str, Any]:
        """The values that are allowed; null and blank are the same as not given, 0 may say None."""
        found: dict[str, Any] = {}
        for key, raw in entry.items():
            if raw in (None, "") or (key in COMMON_FIELDS and table is not COMMON_FIELDS):
                continue
            if key in table:
                try:
                    found[key] = option_values.parse_value(
                        table[key], expand_placeholders(raw, self.environ)
                    )
                except option_values.InvalidOptionValue as error:
                    self.add_problem(
                        f"{name}.{option_values.format_assignment(table[key], raw)}: {error}",
                        at,
                        key,
                    )
                except ConfigError as error:
                    self.add_problem(f"{name}.{key}: {error}", at, key)
            elif key in REFUSED_FIELDS:
                if not any(
                    raw == item and isinstance(raw, type(item))
                    for item in HARMLESS_VALUES.get(key, ())
                ):
                    self.add_problem(f"{name}.{key} is not offered: {REFUSED_FIELDS[key]}", at, key)
            elif key in UNNEEDED_FIELDS:
                self.notices.append(f"{name}.{key} is not needed: {UNNEEDED_FIELDS[key]}")
            elif key in ALL_FIELD_NAMES:
                self.add_problem(
                    f"{name}.{key} does not belong into a set of this dataset_type", at, key
                )
            else:
                self.add_problem(
                    f"{name}.{key}: unknown field{did_you_mean(key, ALL_FIELD_NAMES)}", at, key
                )
        return found

    def validate_fields(
        self, at: int, name: str, model: type[SectionT], given: dict[str, Any]
    ) -> SectionT:
        return validate_section(
            model, given, lambda key, what: self.add_problem(f"{name}.{what}", at, key)
        )

    def build_dataset(
        self, at: int, name: str, kind: str, given: dict[str, Any]
    ) -> DatasetConfig | None:
        before = len(self.problems)
        folder = self.resolve_data_dir(at, name, given)
        if isinstance(given.get("instance_prompt"), str):
            given["instance_prompt"] = [given["instance_prompt"]]
        laid_over = {key: given.pop(key) for key in RUN_OPTION_FIELDS if key in given}
        fields = self.validate_fields(at, name, ImageDatasetFields, given)
        own = self.validate_fields(
            at, name, DataOptions, {**self.run_options.model_dump(), **laid_over}
        )
        for key, what in check_sizes_and_captions(own) if laid_over else ():
            self.add_problem(f"{name}.{key}: {what}", at, key)
        prompts = fields.instance_prompt or filter(
            None, [(self.run_options.instance_prompt or "").strip()]
        )
        dataset = DatasetConfig(
            id=name,
            dataset_type=kind,
            instance_data_dir=folder or Path(),
            resize_crop=self.build_resize_crop(at, name, kind, fields, own),
            caption_strategy=own.caption_strategy,
            instance_prompts=tuple(prompts),
            prepend_instance_prompt=own.prepend_instance_prompt,
            only_instance_prompt=own.only_instance_prompt,
            disable_multiline_split=fields.disable_multiline_split,
            repeats=fields.repeats,
            probability=fields.probability,
            max_num_samples=fields.max_num_samples,
        )
        made = own.caption_strategy == "instanceprompt" or own.prepend_instance_prompt
        if (made or own.only_instance_prompt) and not dataset.instance_prompts:
            self.add_problem(f"{name}.instance_prompt is missing: its captions are made of it", at)
        return dataset if folder is not None and len(self.problems) == before else None

    def build_resize_crop(
        self, at: int, name: str, kind: str, fields: ImageDatasetFields, own: DataOptions
    ) -> ResizeCropConfig:
        crop, aspect, given = fields.crop, fields.crop_aspect, fields.model_fields_set
        if not crop and "crop_aspect" in given and aspect != "preserve":
            self.notices.append(
                f"{name}.crop_aspect is not used: crop is false, pictures keep their aspect"
            )
        if fields.crop_aspect_buckets and not (crop and aspect == "closest"):
            what = f'{name}.crop_aspect_buckets needs "crop": true and "crop_aspect": "closest"'
            self.add_problem(what, at, "crop_aspect_buckets")
        style = (
            fields.crop_style if kind != "eval" and (crop or "crop_style" in given) else "center"
        )
        shared = own.model_dump(include={one.name for one in dataclasses.fields(ResizeCropConfig)})
        ratios = tuple(fields.crop_aspect_buckets or ())
        return ResizeCropConfig(
            crop=crop, crop_style=style, crop_aspect=aspect, crop_aspect_buckets=ratios, **shared
        )

    def resolve_data_dir(self, at: int, name: str, given: dict[str, Any]) -> Path | None:
        if "instance_data_dir" not in given:
            if not self.entries[at].get("instance_data_dir"):
                self.add_problem(
                    f"{name}.instance_data_dir is missing: the folder of the pictures", at
                )
            return None
        written = given["instance_data_dir"]
        folder = self.resolve_folder(written)
        if os.path.isdir(folder):
            return folder
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        shown = f"{name}.instance_data_dir = {json.dumps(written, ensure_ascii=False)}"
        self.add_problem(f"{shown} {what} (resolved to {folder})", at, "instance_data_dir")
        return None

    def resolve_folder(self, written: str) -> Path:
        """Absolute; beside the dataset file when it exists there, else in the working directory."""
        found, tried = find_path(written, self.base_folder, Path.cwd())
        return Path(found or tried[-1])
