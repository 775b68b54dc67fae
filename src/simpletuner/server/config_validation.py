"""What the reader of `simpletuner train` says about a configuration that came through the server.

Beside its rules: some options are not settable here, {env:NAME} is not read, and paths stay inside the
allowed folders. Nothing outside them is looked at, and nothing of the environment is in any answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simpletuner.config import constraints
from simpletuner.config.load import (
    ConfigLoadResult,
    LoadedConfig,
    resolved_options,
    try_load_mapping,
)
from simpletuner.config.option_catalog import all_options, option_aliases
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_file import try_read_datasets
from simpletuner.errors import Problem
from simpletuner.server.form_schema import NOT_SETTABLE
from simpletuner.server.schemas.base import ErrorDetail
from simpletuner.server.schemas.configs import ConfigValidationResult
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace

ENV_PLACEHOLDER = "{env:"
DATASET_FOLDER_FIELDS = ("instance_data_dir", "cache_dir")  # of a dataset


def validate_config(
    place: Workspace, config: Mapping[str, Any], datasets: Sequence[Any]
) -> ConfigValidationResult:
    """Every problem of both at once. Relative paths are looked for in the workspace."""
    complaints, tried = validate_options(place, config)
    found, notes = _validate_datasets(place, datasets, tried.data_options or DataOptions())
    loaded = tried.loaded
    if loaded is None:
        return ConfigValidationResult(problems=[*complaints, *found], notes=notes, changed={})
    return ConfigValidationResult(
        problems=[*complaints, *found],
        notes=[*loaded.notices, *notes],
        changed=changed_options(loaded),
    )


def validate_options(
    place: Workspace, config: Mapping[str, Any]
) -> tuple[list[ErrorDetail], ConfigLoadResult]:
    """What is wrong with the options alone; and what was read of those that are not refused."""
    complaints = [*_forbidden_options(place, config)]
    refused = {complaint.loc for complaint in complaints}
    read = {name: value for name, value in config.items() if canonical_name(name) not in refused}
    tried = try_load_mapping(read, place.root)
    complaints += [to_error_detail(problem) for problem in tried.problems]
    if tried.loaded is not None and tried.loaded.config.model.mixed_precision == "fp16":
        complaints.append(
            ErrorDetail(loc="mixed_precision", message=constraints.FP16_REFUSAL.partition(": ")[2])
        )
    return complaints, tried


def changed_options(loaded: LoadedConfig) -> dict[str, Any]:
    """What was given and is not the default."""
    now, given = (
        resolved_options(loaded.config),
        (name for name, where in loaded.origins.items() if where != "default"),
    )
    return {name: now[name] for name in given if now[name] != all_options()[name].default}


def canonical_name(name: str) -> str:
    """An option's own name, however it was spelt."""
    plain = name.lstrip("-").replace("-", "_")
    return option_aliases().get(plain, plain)


def to_error_detail(problem: Problem) -> ErrorDetail:
    """With the option as loc, also where the reader knows no place: "lr_end: 1 is above ..."."""
    if problem.location:
        return ErrorDetail(loc=canonical_name(problem.location), message=problem.message)
    name, colon, what = problem.message.partition(": ")
    known = bool(colon) and name in all_options()
    return ErrorDetail(loc=name if known else "", message=what if known else problem.message)


def has_env_placeholder(value: Any) -> bool:
    """Whether a text somewhere inside has one, keys too."""
    return ENV_PLACEHOLDER in json.dumps(value, default=str)


def _forbidden_options(place: Workspace, config: Mapping[str, Any]) -> Iterator[ErrorDetail]:
    """What the reader must not see."""
    for written, value in config.items():
        name = canonical_name(written)
        option = all_options().get(name)
        if name in NOT_SETTABLE and value not in (None, ""):
            yield ErrorDetail(loc=name, message=f"cannot be set here: it {NOT_SETTABLE[name]}")
        elif has_env_placeholder({written: value}):
            yield ErrorDetail(
                loc=name, message="{env:NAME} is not read here; write the value itself"
            )
        elif option is not None and option.path and isinstance(value, (int, float)):
            yield ErrorDetail(loc=name, message="must be text")  # the reader would make it a path
        elif option is not None and option.path and isinstance(value, str) and value.strip():
            try:
                place.resolve(value)
            except PathOutsideWorkspace as error:
                yield ErrorDetail(loc=name, message=str(error))


def _validate_datasets(
    place: Workspace, datasets: Sequence[Any], options: DataOptions
) -> tuple[list[ErrorDetail], list[str]]:
    """Folders are read as absolute paths of the allowed ones; in place of a refused one, the workspace."""
    found: list[ErrorDetail] = []
    sets: list[Any] = []
    for at, entry in enumerate(datasets):
        if not isinstance(entry, Mapping):
            sets.append(entry)
            continue
        name = entry.get("id") if isinstance(entry.get("id"), str) else f"[{at}]"
        copy = dict(entry)
        for key, value in entry.items():
            if has_env_placeholder({key: value}):
                found.append(
                    ErrorDetail(loc=f"{name}.{key}", message="{env:NAME} is not read here")
                )
                copy.pop(key)
                if key == "instance_data_dir":
                    copy[key] = str(place.root)
            elif key in DATASET_FOLDER_FIELDS and isinstance(value, (int, float)):
                found.append(ErrorDetail(loc=f"{name}.{key}", message="must be text"))
                copy[key] = str(place.root)
            elif key in DATASET_FOLDER_FIELDS and isinstance(value, str) and value.strip():
                try:
                    copy[key] = str(place.resolve(value))
                except PathOutsideWorkspace as error:
                    found.append(ErrorDetail(loc=f"{name}.{key}", message=str(error)))
                    copy[key] = str(place.root)
        sets.append(copy)
    if not sets:
        return [
            ErrorDetail(
                loc="datasets", message="there is no dataset yet; name a folder of pictures"
            )
        ], []
    backends, problems = try_read_datasets(sets, place.root, options)
    found += [
        ErrorDetail(
            loc=problem.location, message=problem.message.removeprefix(f"{problem.location}: ")
        )
        for problem in problems
    ]
    return found, list(backends.notices)
