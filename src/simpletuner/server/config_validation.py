"""Validation of configurations sent to the server, by the loader of `simpletuner train`.

In addition, some options cannot be set here, {env:NAME} is not substituted, and paths must be
inside the allowed folders. Validation reads nothing outside of them, and no response contains
environment variables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from simpletuner.config import constraints
from simpletuner.config.load import (
    ConfigLoadResult,
    LoadedConfig,
    resolved_options,
    try_load_mapping,
)
from simpletuner.config.option_catalog import all_options, option_aliases
from simpletuner.config.output_folder import find_output_dir_problems
from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.data.dataset_fields import TABLE_BLOCK
from simpletuner.data.dataset_file import try_read_datasets
from simpletuner.data.source_fields import SOURCE_FIELDS
from simpletuner.errors import Problem
from simpletuner.server.form_schema import NOT_SETTABLE
from simpletuner.server.schemas.base import ErrorDetail
from simpletuner.server.schemas.configs import ConfigValidationResult
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace

ENV_PLACEHOLDER = "{env:"
REMOTE_REASON = (
    "cannot be set here: it reads from other machines; set it in a dataset file and train from a "
    "terminal"
)
DATASET_FOLDER_FIELDS = ("instance_data_dir", "cache_dir")
# Each of these alone gives the validation images a prompt.
PROMPT_OPTIONS = ("validation_prompt", "user_prompt_library", "validation_prompt_library")


@dataclass(frozen=True)
class ValidatedConfig:
    """A validation result with the options and datasets that it loaded.

    loaded: None if the options have problems. datasets: those without problems.
    """

    result: ConfigValidationResult
    loaded: LoadedConfig | None
    datasets: DatasetFile


def validate_config(
    workspace: Workspace, config: Mapping[str, Any], datasets: Sequence[Any]
) -> ConfigValidationResult:
    """Return all problems of the options and the datasets.

    Relative paths start at the workspace.
    """
    return read_and_validate(workspace, config, datasets).result


def read_and_validate(
    workspace: Workspace, config: Mapping[str, Any], datasets: Sequence[Any]
) -> ValidatedConfig:
    """Validate like validate_config, and return the loaded options and datasets as well."""
    option_problems, result = validate_options(workspace, config)
    data_options = result.data_options or DataOptions()
    dataset_problems, read = _validate_datasets(workspace, datasets, data_options)
    problems = [*option_problems, *dataset_problems]
    notes = list(read.notices)
    output_dir = {canonical_name(name): value for name, value in config.items()}.get("output_dir")
    if isinstance(output_dir, str) and (run_dir := workspace.resolve_or_none(output_dir)):
        problems += [
            ErrorDetail(loc="output_dir", message=text)
            for text in output_dir_problems(workspace, run_dir, datasets)
        ]
    loaded = result.loaded
    if loaded is None:
        return ValidatedConfig(
            ConfigValidationResult(problems=problems, notes=notes, changed={}), None, read
        )
    valid = ConfigValidationResult(
        problems=problems,
        notes=[*loaded.notices, *notes],
        changed=changed_options(loaded),
    )
    return ValidatedConfig(valid, loaded, read)


def output_dir_problems(workspace: Workspace, run_dir: Path, datasets: Sequence[Any]) -> list[str]:
    """Return why a run may not use the folder: the refusals of `simpletuner train`, and one more.

    run_dir: resolved.
    """
    if run_dir == workspace.root or workspace.server_dir in (run_dir, *run_dir.parents):
        return [f"output_dir = {run_dir}: this folder belongs to the server; choose another one"]
    folders = {}
    for at, entry in enumerate(datasets):
        given = entry.get("instance_data_dir") if isinstance(entry, Mapping) else None
        if isinstance(given, str) and (folder := workspace.resolve_or_none(given)):
            folders[str(entry.get("id", f"[{at}]"))] = folder
    return list(find_output_dir_problems(run_dir, folders))


def validate_options(
    workspace: Workspace, config: Mapping[str, Any]
) -> tuple[list[ErrorDetail], ConfigLoadResult]:
    """Return the problems of the options, and the result of loading the allowed ones."""
    problems = [*_forbidden_options(workspace, config)]
    forbidden = {problem.loc for problem in problems}
    allowed = {
        name: value for name, value in config.items() if canonical_name(name) not in forbidden
    }
    result = try_load_mapping(allowed, workspace.root)
    problems += [to_error_detail(problem) for problem in result.problems]
    if result.loaded is not None and result.loaded.config.model.mixed_precision == "fp16":
        problems.append(
            ErrorDetail(loc="mixed_precision", message=constraints.FP16_REFUSAL.partition(": ")[2])
        )
    return problems, result


def changed_options(loaded: LoadedConfig) -> dict[str, Any]:
    """Return the options that were given and differ from their default."""
    values = resolved_options(loaded.config)
    given = (name for name, origin in loaded.origins.items() if origin != "default")
    return {name: values[name] for name in given if values[name] != all_options()[name].default}


def canonical_name(name: str) -> str:
    """Return the canonical name of an option, given as an alias, with dashes or as a flag."""
    plain = name.lstrip("-").replace("-", "_")
    return option_aliases().get(plain, plain)


def to_error_detail(problem: Problem) -> ErrorDetail:
    """Convert a problem, using the option as `loc`.

    A problem without a location starts with the option's name instead: "lr_end: 1 is above ...".
    """
    if problem.location:
        return ErrorDetail(loc=canonical_name(problem.location), message=problem.message)
    name, colon, message = problem.message.partition(": ")
    known = bool(colon) and name in all_options()
    return ErrorDetail(loc=name if known else "", message=message if known else problem.message)


def folder_in_workspace(workspace: Workspace, path: str) -> str:
    """Return a run folder below output/ with the last name of a path that is not allowed."""
    name = PurePath(path.strip().replace("\\", "/")).name.lstrip(".")
    candidate = f"{workspace.output_dir.name}/{name or 'run'}"
    return candidate if workspace.resolve_or_none(candidate) is not None else ""


def has_env_placeholder(value: Any) -> bool:
    """Return True if any string in the value, including keys, contains a placeholder."""
    return ENV_PLACEHOLDER in json.dumps(value, default=str)


def _forbidden_options(workspace: Workspace, config: Mapping[str, Any]) -> Iterator[ErrorDetail]:
    """Yield the problems of options that must not reach the loader.

    These are options that cannot be set here, placeholders, and paths outside the allowed folders.
    """
    for written, value in config.items():
        name = canonical_name(written)
        option = all_options().get(name)
        if name in NOT_SETTABLE and value not in (None, ""):
            yield ErrorDetail(loc=name, message=f"cannot be set here: it {NOT_SETTABLE[name]}")
        elif has_env_placeholder({written: value}):
            yield ErrorDetail(
                loc=name, message="{env:NAME} is not supported here; enter the value itself"
            )
        elif option is not None and option.path and isinstance(value, (int, float)):
            yield ErrorDetail(loc=name, message="must be text")  # the loader would use it as a path
        elif option is not None and option.path and isinstance(value, str) and value.strip():
            try:
                workspace.resolve(value)
            except PathOutsideWorkspace as error:
                suggestion = folder_in_workspace(workspace, value) if name == "output_dir" else ""
                yield ErrorDetail(loc=name, message=str(error), suggestion=suggestion)


def _remote_fields(entry: Mapping[str, Any]) -> list[str]:
    """Return the fields by which a dataset reads from other machines, or tables of other files."""
    paths = ("instance_data_dir", "caption_table", TABLE_BLOCK)
    remote = {name for name in SOURCE_FIELDS if entry.get(name) not in (None, "")}
    remote |= {name for name in paths if "://" in json.dumps(entry.get(name), default=str)}
    is_image = entry.get("dataset_type") in (None, "", "image", "eval")
    if is_image and entry.get("type") not in (None, "", "local", "webdataset"):
        remote.add("type")
    return sorted(remote)


def _validate_datasets(
    workspace: Workspace, datasets: Sequence[Any], options: DataOptions
) -> tuple[list[ErrorDetail], DatasetFile]:
    """Return the problems of the datasets, and the datasets without problems.

    Folders are resolved to absolute paths. A folder that is not allowed is replaced by the
    workspace, so that the remaining fields are still checked.
    """
    problems: list[ErrorDetail] = []
    resolved: list[Any] = []
    for at, entry in enumerate(datasets):
        if not isinstance(entry, Mapping):
            resolved.append(entry)
            continue
        name = entry.get("id") if isinstance(entry.get("id"), str) else f"[{at}]"
        copy = dict(entry)
        for key in _remote_fields(entry):
            problems.append(ErrorDetail(loc=f"{name}.{key}", message=REMOTE_REASON))
            copy[key] = str(workspace.root) if key == "instance_data_dir" else None
        for key, value in list(copy.items()):
            if has_env_placeholder({key: value}):
                problems.append(
                    ErrorDetail(loc=f"{name}.{key}", message="{env:NAME} is not supported here")
                )
                copy.pop(key)
                if key == "instance_data_dir":
                    copy[key] = str(workspace.root)
            elif key in DATASET_FOLDER_FIELDS and isinstance(value, (int, float)):
                problems.append(ErrorDetail(loc=f"{name}.{key}", message="must be text"))
                copy[key] = str(workspace.root)
            elif key in DATASET_FOLDER_FIELDS and isinstance(value, str) and value.strip():
                try:
                    copy[key] = str(workspace.resolve(value))
                except PathOutsideWorkspace as error:
                    problems.append(ErrorDetail(loc=f"{name}.{key}", message=str(error)))
                    copy[key] = str(workspace.root)
        resolved.append(copy)
    if not resolved:
        return [
            ErrorDetail(loc="datasets", message="there is no dataset; add a folder of images")
        ], DatasetFile((), (), None)
    refused = {problem.loc for problem in problems}
    backends, dataset_problems = try_read_datasets(resolved, workspace.root, options)
    problems += [
        ErrorDetail(
            loc=problem.location, message=problem.message.removeprefix(f"{problem.location}: ")
        )
        for problem in dataset_problems
        if problem.location not in refused
    ]
    return problems, backends
