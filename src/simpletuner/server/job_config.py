"""The configuration of a job, fixed when it is queued, with absolute paths."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simpletuner.atomic_io import write_atomically
from simpletuner.config import paths
from simpletuner.config.documents import read_document
from simpletuner.config.option_catalog import all_options
from simpletuner.server.api_errors import ApiError, abort
from simpletuner.server.config_validation import (
    DATASET_FOLDER_FIELDS,
    canonical_name,
    output_dir_problems,
    validate_config,
)
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.form_schema import NOT_SETTABLE
from simpletuner.server.image_choice_store import NO_CHOICES, ImageChoiceStore
from simpletuner.server.run_artifacts import checkpoint_step, list_outputs
from simpletuner.server.schemas.base import ErrorDetail
from simpletuner.server.schemas.configs import Draft, PromptEntry
from simpletuner.server.schemas.runs import ResumeRequest
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace

LENGTH_OPTIONS = ("max_train_steps", "num_train_epochs")
MAX_NAME_LENGTH = 64
PROMPTS_FILE = "prompts.json"


def run_folder_name(name: str) -> str:
    """Return a folder name for a draft's name: letters, digits, "_", "." and "-"."""
    return re.sub(r"[^\w.]+", "-", name).strip("-._")[:MAX_NAME_LENGTH] or "run"


@dataclass(frozen=True)
class JobConfig:
    """The frozen configuration of a job.

    config: has an absolute output_dir. datasets: have absolute folders. prompts: replace
    user_prompt_library if there are any. omitted_options: options of
    a run's own configuration that the server does not accept, with the reason.
    """

    config: Mapping[str, Any]
    datasets: Sequence[Mapping[str, Any]]
    omitted_options: tuple[str, ...] = ()
    prompts: Sequence[PromptEntry] = ()

    @property
    def run_dir(self) -> Path:
        return Path(self.config["output_dir"])

    @property
    def device_count(self) -> int | None:
        """The number of GPUs that the job asks for; None for all."""
        processes = self.config.get("num_processes", 1)
        return None if processes == "auto" else int(processes)

    def write(self, folder: Path) -> Path:
        """Write config.json, its datasets and prompts; return the path of config.json."""
        folder.mkdir(parents=True)
        datasets_path = folder / "multidatabackend.json"
        config_path = folder / "config.json"
        config = {**self.config, "data_backend_config": str(datasets_path)}
        if self.prompts:
            config["user_prompt_library"] = str(folder / PROMPTS_FILE)
            write_prompts(folder / PROMPTS_FILE, self.prompts)
        write_atomically(datasets_path, _to_json(self.datasets))
        write_atomically(config_path, _to_json(config))
        return config_path


def write_prompts(path: Path, prompts: Iterable[PromptEntry]) -> None:
    """Write a prompt library as `user_prompt_library` reads it."""
    library = {
        entry.name: entry.model_dump(exclude={"name"}, exclude_defaults=True) for entry in prompts
    }
    write_atomically(path, _to_json(library))


def read_prompt_file(path: Any, workspace: Workspace) -> tuple[list[PromptEntry], bool]:
    """Return the prompts of a library, and True if the server wrote it for a job."""
    real = workspace.resolve_or_none(path) if isinstance(path, str) else None
    content = (read_json_object(real) if real is not None else None) or {}
    prompts = []
    for name, value in content.items():
        fields = {"prompt": value} if isinstance(value, str) else value
        if isinstance(fields, dict):
            with contextlib.suppress(ValidationError):
                prompts.append(PromptEntry(name=name, **fields))
    own = real is not None and workspace.server_dir in real.parents
    return prompts, own and bool(prompts)


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def job_config_from_draft(draft: Draft, workspace: Workspace, trains: bool = True) -> JobConfig:
    """Return the job configuration of a draft.

    trains: False for a dry run, which writes no results.

    Raises ApiError 422 for folders that are not allowed, and for an output_dir that already holds
    results unless resume_from_checkpoint says what to do with them.
    """
    config = {canonical_name(name): value for name, value in draft.config.items()}
    loc = "output_dir" if config.get("output_dir") else "name"
    given = config.get("output_dir") or workspace.output_dir / run_folder_name(draft.name)
    run_dir = _resolve_or_abort(workspace, given, "output_dir")
    if problems := output_dir_problems(workspace, run_dir, draft.datasets):
        raise ApiError(422, [ErrorDetail(loc="output_dir", message=text) for text in problems])
    if trains and config.get("resume_from_checkpoint", "latest") == "latest":
        _require_no_results(run_dir, loc)
    return JobConfig(
        {**config, "output_dir": str(run_dir)},
        with_image_choices(_with_absolute_paths(draft.datasets, workspace), workspace),
        prompts=draft.prompts,
    )


def _require_no_results(run_dir: Path, loc: str) -> None:
    """Raise ApiError 422 if the folder holds results.

    The training would resume from these checkpoints, or fail only after it has started.
    """
    newest = max(run_dir.glob("checkpoint-*"), key=checkpoint_step, default=None)
    outputs = list_outputs(run_dir)
    if newest is None and not outputs:
        return
    result = newest.name if newest else outputs[0].path
    resume = f", or to {newest.name} to resume from it with this configuration" if newest else ""
    abort(
        422,
        f"{run_dir} already holds the results of a run ({result}). Choose another {loc}; or resume "
        f"that run on its page; or set resume_from_checkpoint to never to move them aside{resume}",
        loc,
    )


def _resolve_or_abort(workspace: Workspace, path: str | Path, loc: str) -> Path:
    try:
        return workspace.resolve(path)
    except PathOutsideWorkspace as error:
        abort(422, f"{loc} = {path}: {error}", loc)


def _with_absolute_paths(
    datasets: Sequence[Mapping[str, Any]], workspace: Workspace
) -> list[dict[str, Any]]:
    """Return validated datasets with absolute folders."""
    return [
        dataset
        | {
            key: str(workspace.resolve(dataset[key]))
            for key in DATASET_FOLDER_FIELDS
            if dataset.get(key)
        }
        for dataset in map(dict, datasets)
    ]


def with_image_choices(
    datasets: Sequence[dict[str, Any]], workspace: Workspace
) -> list[dict[str, Any]]:
    """Return datasets with what was decided on the pages about single images."""
    store = ImageChoiceStore(workspace)
    changed = []
    for dataset in datasets:
        folder = dataset.get("instance_data_dir")
        choices = NO_CHOICES
        if isinstance(folder, str) and dataset.get("type", "local") == "local":
            choices = store.of(workspace.resolve(folder))
        changed.append({**dataset, **choices.to_fields(dataset)})
    return changed


def job_config_from_run(
    run_dir: Path,
    source: Path,
    workspace: Workspace,
    request: ResumeRequest,
) -> JobConfig:
    """Return the configuration to resume a run with.

    source: the config.json of its last job, or the one in the run folder. The latter may come from
    anywhere, so it is validated like a draft (ApiError 422), and options that cannot be set on a
    page are omitted.
    """
    written = read_json_object(source) or abort(409, "this run has no config.json to resume with")
    options = all_options()
    config = {n: v for n, v in written.items() if n not in options or v != options[n].default}
    datasets = load_run_datasets(config, workspace)
    unset = [
        name for name in NOT_SETTABLE if config.pop(name, None) and name != "data_backend_config"
    ]
    max_train_steps = request.max_train_steps
    if max_train_steps is not None:
        config = {key: value for key, value in config.items() if key not in LENGTH_OPTIONS}
        config["max_train_steps"] = max_train_steps
    config |= {"output_dir": str(run_dir), "resume_from_checkpoint": request.checkpoint or "latest"}
    if request.learning_rate is not None:
        config |= {"learning_rate": request.learning_rate, "resume_with_changes": True}
    problems = validate_config(workspace, config, datasets).problems
    if problems:
        raise ApiError(422, problems)
    prompts, own = read_prompt_file(config.get("user_prompt_library"), workspace)
    omitted = tuple(f"{name} was omitted: it {NOT_SETTABLE[name]}" for name in unset)
    absolute = _with_absolute_paths(datasets, workspace)
    return JobConfig(config, absolute, omitted, prompts if own else ())


def load_run_datasets(config: Mapping[str, Any], workspace: Workspace) -> list[Any]:
    """Return the datasets that a run's configuration refers to, with absolute folders.

    Relative folders start at the folder of the dataset file, as in `simpletuner train`. Raises
    ApiError and ConfigError.
    """
    file = config.get("data_backend_config")
    if not isinstance(file, str):
        return []
    path = _resolve_or_abort(workspace, file, "data_backend_config")
    if not path.is_file():  # reading a named pipe would block
        abort(422, f"data_backend_config = {file}: there is no such file", "data_backend_config")
    value = read_document(path, path.name).value
    datasets = value if isinstance(value, list) else [value]
    for dataset in filter(lambda entry: isinstance(entry, dict), datasets):
        for key in DATASET_FOLDER_FIELDS:
            if isinstance(dataset.get(key), str):
                folder, _ = paths.find_path(dataset[key], path.parent, path.parent)
                dataset[key] = folder or dataset[key]
    return datasets
