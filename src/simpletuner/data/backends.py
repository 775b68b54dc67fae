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

from simpletuner.config import jsonc, values
from simpletuner.config.catalog import Option
from simpletuner.config.environment import expand
from simpletuner.config.files import read_document
from simpletuner.config.paths import find
from simpletuner.config.rules import sizes_and_captions
from simpletuner.config.schema import DataOptions
from simpletuner.config.values import Kind, did_you_mean, section_of
from simpletuner.data.dataset import Backends, Dataset
from simpletuner.data.fields import (
    CACHES,
    HARMLESS,
    KNOWN,
    OF_THE_RUN,
    PICTURES,
    REFUSED,
    SHARED,
    UNNEEDED,
    CacheFields,
    PictureFields,
)
from simpletuner.data.geometry import Framing
from simpletuner.errors import ConfigError, Problem

EXAMPLE = '[{"id": "photos", "instance_data_dir": "datasets/photos"}]'


def read_backends(path: Path, options: DataOptions, environ: Mapping[str, str] | None = None) -> Backends:
    """Read and check a dataset file.

    options: what holds where a set has no field of its own. environ: for {env:NAME} in texts; None is the
    environment of the process. Folders are looked for beside the file, then in the working directory.
    Raises ConfigError with every problem of the file.
    """
    if not os.path.lexists(path):
        raise ConfigError([Problem(str(path), f"no such dataset file; the smallest one is {EXAMPLE}")])
    document = read_document(path, path.name)
    reader = _Reader(path.resolve().parent, document.value, document.where, options, environ)
    backends = reader.read()
    if reader.problems:
        raise ConfigError(reader.problems)
    return backends


def attempt_sets(
    sets: Sequence[Any], folder: Path, options: DataOptions
) -> tuple[Backends, tuple[Problem, ...]]:
    """As `read_backends`, of sets that are in no file yet: `where` is "photos.resolution".

    folder: where relative folders are looked for first. No placeholder is read.
    """

    def where(path: jsonc.Path) -> str:
        at, *inside = (str(part) for part in path) if path else ("",)
        entry = sets[int(at)] if at else None
        name = entry.get("id") if isinstance(entry, dict) else None
        return ".".join((name if isinstance(name, str) and name else f"[{at}]", *inside)) if at else ""

    reader = _Reader(folder, list(sets), where, options, {})
    return reader.read(), tuple(reader.problems)


@dataclass
class _Reader:
    """One pass over one file; problems and notes gather here."""

    folder: Path
    sets: Any
    where: Callable[[jsonc.Path], str]
    options: DataOptions
    environ: Mapping[str, str] | None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, what: str, *where: str | int) -> None:
        self.problems.append(Problem(self.where(where), what))

    def read(self) -> Backends:
        if not isinstance(self.sets, list):
            self.problem(f"a list of datasets is expected, such as {EXAMPLE}")
            return Backends((), (), None)
        found: list[Dataset] = []
        ids: dict[str, int] = {}
        text_caches: list[tuple[bool, Path | None]] = []
        for at, entry in enumerate(self.sets):
            if not isinstance(entry, dict):
                self.problem("a dataset is expected: fields in { }", at)
                continue
            name = self.identity(at, entry, ids)
            given = {key: entry[key] for key in SHARED if entry.get(key) not in (None, "")}
            shared = self.fields(at, name, given, SHARED)
            if shared.get("disabled") or shared.get("disable") or shared.keys() != given.keys():
                continue
            kind = shared.get("dataset_type", "image")
            if kind in ("image", "eval"):
                dataset = self.dataset(at, name, kind, self.fields(at, name, entry, PICTURES))
                found += [dataset] if dataset is not None else []
            else:
                cache = self.bounded(at, name, CacheFields, self.fields(at, name, entry, CACHES))
                folder = self.beside(cache.cache_dir) if cache.cache_dir else None
                if kind == "text_embeds":
                    text_caches.append((cache.default, folder))
                elif folder is not None:
                    self.notes.append(f"{name}.cache_dir is not used: {UNNEEDED['image_embeds']}")
        train = tuple(dataset for dataset in found if dataset.dataset_type == "image")
        if not train and not self.problems:
            self.problem("no set of dataset_type image is enabled, so there is nothing to train on")
        return Backends(
            train,
            tuple(dataset for dataset in found if dataset.dataset_type == "eval"),
            self.text_cache(text_caches),
            tuple(self.notes),
        )

    def text_cache(self, caches: list[tuple[bool, Path | None]]) -> Path | None:
        default = [folder for is_default, folder in caches if is_default]
        if len(default) > 1 or (len(caches) > 1 and not default):
            self.problem('of several text_embeds sets exactly one needs "default": true')
        return (default or [folder for _, folder in caches] or [None])[0]

    def identity(self, at: int, entry: dict[str, Any], ids: dict[str, int]) -> str:
        name = entry.get("id")
        if not isinstance(name, str) or not name.strip():
            self.problem('"id" is missing: a name for the dataset, unique in this file', at)
            return f"[{at}]"
        if re.search(r"[/\\\x00-\x1f\x7f]", name):
            self.problem(f"id = {json.dumps(name)}: slashes and control characters are not allowed", at, "id")
        if name in ids:
            first = self.where((ids[name], "id"))
            self.problem(f"id = {json.dumps(name)} is already used at {first}", at, "id")
        ids.setdefault(name, at)
        return name

    def fields(
        self, at: int, name: str, entry: dict[str, Any], table: Mapping[str, Option]
    ) -> dict[str, Any]:
        """The values that are allowed; null and blank are the same as not given, 0 may say None."""
        found: dict[str, Any] = {}
        for key, raw in entry.items():
            if raw in (None, "") or (key in SHARED and table is not SHARED):
                continue
            if key in table:
                try:
                    found[key] = values.read(table[key], expand(raw, self.environ))
                except values.BadValue as error:
                    self.problem(f"{name}.{values.shown(table[key], raw)}: {error}", at, key)
                except ConfigError as error:
                    self.problem(f"{name}.{key}: {error}", at, key)
            elif key in REFUSED:
                if not any(raw == item and isinstance(raw, type(item)) for item in HARMLESS.get(key, ())):
                    self.problem(f"{name}.{key} is not offered: {REFUSED[key]}", at, key)
            elif key in UNNEEDED:
                self.notes.append(f"{name}.{key} is not needed: {UNNEEDED[key]}")
            elif key in KNOWN:
                self.problem(f"{name}.{key} does not belong into a set of this dataset_type", at, key)
            else:
                self.problem(f"{name}.{key}: unknown field{did_you_mean(key, KNOWN)}", at, key)
        return found

    def bounded(self, at: int, name: str, model: type[Kind], given: dict[str, Any]) -> Kind:
        return section_of(model, given, lambda key, what: self.problem(f"{name}.{what}", at, key))

    def dataset(self, at: int, name: str, kind: str, given: dict[str, Any]) -> Dataset | None:
        before = len(self.problems)
        folder = self.data_dir(at, name, given)
        if isinstance(given.get("instance_prompt"), str):
            given["instance_prompt"] = [given["instance_prompt"]]
        laid_over = {key: given.pop(key) for key in OF_THE_RUN if key in given}
        fields = self.bounded(at, name, PictureFields, given)
        own = self.bounded(at, name, DataOptions, {**self.options.model_dump(), **laid_over})
        for key, what in sizes_and_captions(own) if laid_over else ():
            self.problem(f"{name}.{key}: {what}", at, key)
        prompts = fields.instance_prompt or filter(None, [(self.options.instance_prompt or "").strip()])
        dataset = Dataset(
            id=name,
            dataset_type=kind,
            instance_data_dir=folder or Path(),
            framing=self.framing(at, name, kind, fields, own),
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
            self.problem(f"{name}.instance_prompt is missing: its captions are made of it", at)
        return dataset if folder is not None and len(self.problems) == before else None

    def framing(self, at: int, name: str, kind: str, fields: PictureFields, own: DataOptions) -> Framing:
        crop, aspect, given = fields.crop, fields.crop_aspect, fields.model_fields_set
        if not crop and "crop_aspect" in given and aspect != "preserve":
            self.notes.append(f"{name}.crop_aspect is not used: crop is false, pictures keep their aspect")
        if fields.crop_aspect_buckets and not (crop and aspect == "closest"):
            what = f'{name}.crop_aspect_buckets needs "crop": true and "crop_aspect": "closest"'
            self.problem(what, at, "crop_aspect_buckets")
        style = fields.crop_style if kind != "eval" and (crop or "crop_style" in given) else "center"
        shared = own.model_dump(include={one.name for one in dataclasses.fields(Framing)})
        ratios = tuple(fields.crop_aspect_buckets or ())
        return Framing(crop=crop, crop_style=style, crop_aspect=aspect, crop_aspect_buckets=ratios, **shared)

    def data_dir(self, at: int, name: str, given: dict[str, Any]) -> Path | None:
        if "instance_data_dir" not in given:
            if not self.sets[at].get("instance_data_dir"):
                self.problem(f"{name}.instance_data_dir is missing: the folder of the pictures", at)
            return None
        written = given["instance_data_dir"]
        folder = self.beside(written)
        if os.path.isdir(folder):
            return folder
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        shown = f"{name}.instance_data_dir = {json.dumps(written, ensure_ascii=False)}"
        self.problem(f"{shown} {what} (resolved to {folder})", at, "instance_data_dir")
        return None

    def beside(self, written: str) -> Path:
        """Absolute; beside the dataset file when it exists there, else in the working directory."""
        found, tried = find(written, self.folder, Path.cwd())
        return Path(found or tried[-1])
