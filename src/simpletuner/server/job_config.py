"""A configuration as it was when its job was queued: files of the job's own, without relative paths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.atomic_io import write_atomically
from simpletuner.config import paths
from simpletuner.config.documents import read_document
from simpletuner.config.option_catalog import all_options
from simpletuner.server.api_errors import ApiError, abort
from simpletuner.server.config_validation import (
    DATASET_FOLDER_FIELDS,
    canonical_name,
    validate_config,
)
from simpletuner.server.form_schema import NOT_SETTABLE
from simpletuner.server.log_reader import read_json_object
from simpletuner.server.run_artifacts import checkpoint_step, list_outputs
from simpletuner.server.schemas.configs import Draft
from simpletuner.server.workspace import PathOutsideWorkspace, Workspace

LENGTH_OPTIONS = ("max_train_steps", "num_train_epochs")
MAX_NAME_LENGTH = 64


def run_folder_name(name: str) -> str:
    """What a draft's name makes as a folder: letters, digits, "." and "-", never at the start."""
    return re.sub(r"[^\w.]+", "-", name).strip("-._")[:MAX_NAME_LENGTH] or "run"


@dataclass(frozen=True)
class JobConfig:
    """config: with an absolute output_dir. datasets: with absolute folders. left_out: what a run's own
    configuration says and the server does not take from it, with the reason.
    """

    config: Mapping[str, Any]
    datasets: Sequence[Mapping[str, Any]]
    omitted_options: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        return Path(self.config["output_dir"])

    def write(self, folder: Path) -> Path:
        """config.json and multidatabackend.json; returns what --config takes."""
        folder.mkdir(parents=True)
        sets = folder / "multidatabackend.json"
        write_atomically(sets, _to_json(self.datasets))
        write_atomically(
            folder / "config.json", _to_json({**self.config, "data_backend_config": str(sets)})
        )
        return folder / "config.json"


def _to_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def job_config_from_draft(draft: Draft, place: Workspace, trains: bool = True) -> JobConfig:
    """Refuses (422) folders that are not allowed, and one that holds results already unless the draft says
    what becomes of them, by the name of their option. trains: False for a rehearsal, which writes nothing.
    """
    config = {canonical_name(name): value for name, value in draft.config.items()}
    loc = "output_dir" if config.get("output_dir") else "name"
    given = config.get("output_dir") or place.output_dir / run_folder_name(draft.name)
    run_dir = _resolve_or_abort(place, given, "output_dir")
    if run_dir == place.root or place.server_dir in (run_dir, *run_dir.parents):
        abort(422, f"output_dir = {given}: a run needs a folder of its own", "output_dir")
    if (run_dir / "config.json").exists() and not (run_dir / "run.lock").exists():
        abort(422, f"output_dir = {given}: its config.json is no run's; name another", "output_dir")
    if trains and config.get("resume_from_checkpoint", "latest") == "latest":
        _require_no_results(run_dir, loc)
    return JobConfig(
        {**config, "output_dir": str(run_dir)}, _with_absolute_paths(draft.datasets, place)
    )


def _require_no_results(run_dir: Path, loc: str) -> None:
    """Another training would go on from these checkpoints, or find only when it runs that it cannot."""
    newest = max(run_dir.glob("checkpoint-*"), key=checkpoint_step, default=None)
    found = newest.name if newest else next((one.path for one in list_outputs(run_dir)), None)
    if found is None:
        return
    go_on = f"; {newest.name} goes on from it with this configuration" if newest else ""
    abort(
        422,
        f"{run_dir} holds the results of a run already ({found}). Choose another {loc}; or go on with that "
        f"run by Resume on its page; or set resume_from_checkpoint: never moves them aside{go_on}",
        loc,
    )


def _resolve_or_abort(place: Workspace, path: str | Path, loc: str) -> Path:
    try:
        return place.resolve(path)
    except PathOutsideWorkspace as error:
        abort(422, f"{loc} = {path}: {error}", loc)


def _with_absolute_paths(
    datasets: Sequence[Mapping[str, Any]], place: Workspace
) -> list[dict[str, Any]]:
    """Of sets that were judged, and may be where they are."""
    return [
        {
            **one,
            **{key: str(place.resolve(one[key])) for key in DATASET_FOLDER_FIELDS if one.get(key)},
        }
        for one in datasets
    ]


def job_config_from_run(
    run_dir: Path,
    source: Path,
    place: Workspace,
    max_train_steps: int | None,
    checkpoint: str | None,
) -> JobConfig:
    """What a run goes on with. source: its last frozen config.json, or the one in its folder, which may come
    from anywhere: it is refused (422) what a draft is refused; what no page can set is left out.
    """
    written = read_json_object(source) or abort(409, "this run has no config.json to go on with")
    options = all_options()
    config = {n: v for n, v in written.items() if n not in options or v != options[n].default}
    datasets = load_run_datasets(config, place)
    unset = [
        name for name in NOT_SETTABLE if config.pop(name, None) and name != "data_backend_config"
    ]
    if max_train_steps is not None:
        config = {key: value for key, value in config.items() if key not in LENGTH_OPTIONS}
        config["max_train_steps"] = max_train_steps
    config |= {"output_dir": str(run_dir), "resume_from_checkpoint": checkpoint or "latest"}
    problems = validate_config(place, config, datasets).problems
    if problems:
        raise ApiError(422, problems)
    left_out = tuple(f"{name} is left out: it {NOT_SETTABLE[name]}" for name in unset)
    return JobConfig(config, _with_absolute_paths(datasets, place), left_out)


def load_run_datasets(config: Mapping[str, Any], place: Workspace) -> list[Any]:
    """What the file lists that a run's configuration names, with absolute folders: as `train` finds them,
    beside the file first. Raises Refused, ConfigError.
    """
    file = config.get("data_backend_config")
    if not isinstance(file, str):
        return []
    path = _resolve_or_abort(place, file, "data_backend_config")
    if not path.is_file():  # a pipe would be waited for
        abort(422, f"data_backend_config = {file}: there is no such file", "data_backend_config")
    value = read_document(path, path.name).value
    sets = value if isinstance(value, list) else [value]
    for one in sets:
        for key in DATASET_FOLDER_FIELDS if isinstance(one, dict) else ():
            if isinstance(one.get(key), str):
                one[key] = paths.find_path(one[key], path.parent, path.parent)[0] or one[key]
    return sets
