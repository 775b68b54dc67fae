"""Drafts of configurations, stored as JSON files, so that a reload or a crash loses nothing."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simpletuner.atomic_io import write_atomically
from simpletuner.config import option_values, unsupported_options
from simpletuner.config.documents import parse_document
from simpletuner.config.option_catalog import all_options
from simpletuner.errors import ConfigError
from simpletuner.server.api_errors import ApiError, abort
from simpletuner.server.config_validation import (
    canonical_name,
    folder_in_workspace,
    has_env_placeholder,
)
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.form_schema import NOT_SETTABLE
from simpletuner.server.job_config import load_run_datasets, read_prompt_file
from simpletuner.server.schemas.base import UNSHOWN_CHARACTERS, ErrorDetail
from simpletuner.server.schemas.configs import Draft, DraftWrite, ImportRequest, ImportResult
from simpletuner.server.trash import Trash
from simpletuner.server.workspace import Workspace

DRAFT_ID = re.compile(r"[0-9a-f]{12}")
DRAFT_NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,79}")
# Not copied from a run to a draft: the copy is another run, with its own folder, and starts from
# scratch.
RUN_SPECIFIC_OPTIONS = (
    "output_dir",
    "resume_from_checkpoint",
    "data_backend_config",
    "webhook_config",
)


class DraftStore:
    """The files of .simpletuner/drafts. A lock makes reading and incrementing a version atomic."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._folder = workspace.server_dir / "drafts"
        self._lock = threading.Lock()

    def list_drafts(self) -> list[Draft]:
        """Return all drafts, newest first. Unreadable files are skipped."""
        drafts = [self._read(path) for path in self._folder.glob("*.json")]
        return sorted((draft for draft in drafts if draft), key=lambda draft: -draft.changed_t)

    def get(self, id: str) -> Draft:
        """Return a draft. Raises ApiError 404 if it does not exist."""
        return self._read(self._path(id)) or abort(404, "there is no such draft")

    def create(self, wanted: DraftWrite) -> Draft:
        """Create a draft with version 1."""
        return self._write(secrets.token_hex(6), 1, wanted)

    def update(self, id: str, wanted: DraftWrite) -> Draft:
        """Replace a draft.

        Raises ApiError 409 if it changed since the version that `wanted` is based on.
        """
        with self._lock:
            now = self.get(id)
            if wanted.version is None:
                abort(422, "the version is missing; send the version that was read", "version")
            if wanted.version != now.version:
                abort(409, "this draft has been changed elsewhere; load it again", "version")
            return self._write(id, now.version + 1, wanted)

    def remove(self, id: str) -> None:
        """Move a draft to the trash."""
        with self._lock:
            draft = self.get(id)
            Trash(self._workspace).discard("draft", draft.name, [self._path(id)])

    def rename_dataset(self, old: tuple[str, Path], new: tuple[str, Path]) -> None:
        """Replace the name and the folder of a dataset in all drafts."""
        for draft in self.list_drafts():
            datasets = [
                {**entry, "id": new[0], "instance_data_dir": str(new[1])}
                if entry.get("id") == old[0] and entry.get("instance_data_dir") == str(old[1])
                else entry
                for entry in draft.datasets
            ]
            if datasets != draft.datasets:
                wanted = DraftWrite(
                    name=draft.name,
                    config=draft.config,
                    datasets=datasets,
                    prompts=draft.prompts,
                    version=draft.version,
                )
                self.update(draft.id, wanted)

    def create_from_run(self, folder: Path) -> Draft:
        """Create a draft from a run's configuration, and from its datasets if they can be read."""
        config = read_json_object(folder / "config.json") or abort(
            404, "this run has no readable config.json"
        )
        options = {
            name: value
            for name, value in config.items()
            if name in all_options()
            and name not in RUN_SPECIFIC_OPTIONS
            and value != all_options()[name].default
        }
        try:
            datasets = [
                entry
                for entry in load_run_datasets(config, self._workspace)
                if isinstance(entry, dict)
            ]
        except (ApiError, ConfigError):
            datasets = []
        prompts, own = read_prompt_file(options.get("user_prompt_library"), self._workspace)
        if own:
            del options["user_prompt_library"]
        name = folder.name if DRAFT_NAME.fullmatch(folder.name) else "copy"
        wanted = DraftWrite(
            name=f"{name[:73]} copy",
            config=options,
            datasets=datasets,
            prompts=prompts if own else [],
        )
        return self.create(wanted)

    def _path(self, id: str) -> Path:
        if not DRAFT_ID.fullmatch(id):
            abort(404, "there is no such draft")
        return self._folder / f"{id}.json"

    def _read(self, path: Path) -> Draft | None:
        try:
            return Draft.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None

    def _write(self, id: str, version: int, wanted: DraftWrite) -> Draft:
        name = wanted.name.strip()
        if not DRAFT_NAME.fullmatch(name) or UNSHOWN_CHARACTERS.search(name):
            abort(
                422,
                "a name has 1 to 80 characters, all of them visible, no slash, and does not start "
                "with a dot",
                "name",
            )
        draft = Draft(
            id=id,
            name=name,
            version=version,
            changed_t=time.time(),
            config=wanted.config,
            datasets=wanted.datasets,
            prompts=wanted.prompts,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(id), draft.model_dump_json(indent=1))
        return draft


def parse_import(given: ImportRequest, workspace: Workspace) -> ImportResult:
    """Parse a file of options or of datasets into the form of a draft.

    The result has canonical option names, and neither default values nor options that cannot be set
    here. An output_dir outside the allowed folders becomes one of the same name below output/.
    """
    try:
        value = parse_document(
            given.text, Path(given.name).suffix, Path(given.name).name or "file"
        ).value
    except ConfigError as error:
        problems = [
            ErrorDetail(loc="", message=problem.message, where=problem.location)
            for problem in error.problems
        ]
        return ImportResult(config=None, datasets=None, problems=problems, notes=[])
    if isinstance(value, list):
        datasets = [entry for entry in value if isinstance(entry, dict)]
        invalid = len(value) - len(datasets)
        count = "1 entry is" if invalid == 1 else f"{invalid} entries are"
        message = f"{count} not an object with the fields of a dataset"
        problems = [ErrorDetail(loc="datasets", message=message)] if invalid else []
        return ImportResult(config=None, datasets=datasets, problems=problems, notes=[])
    if not isinstance(value, dict):
        message = "the file contains neither an object of options nor a list of datasets"
        return ImportResult(
            config=None, datasets=None, problems=[ErrorDetail(loc="", message=message)], notes=[]
        )
    if "_metadata" in value and isinstance(value.get("config"), dict):
        value = value["config"]
    config, problems, notes = _normalize_options(value)
    notes += _move_output_dir(config, workspace)
    return ImportResult(config=config, datasets=None, problems=problems, notes=notes)


def _move_output_dir(config: dict[str, Any], workspace: Workspace) -> list[str]:
    """Replace an output_dir that is not allowed; return notes about it."""
    given = config.get("output_dir")
    if not isinstance(given, str) or workspace.resolve_or_none(given) is not None:
        return []
    moved = folder_in_workspace(workspace, given)
    if not moved:
        return []
    config["output_dir"] = moved
    return [f"output_dir is {moved} in the workspace, because {given} is outside of it"]


def _normalize_options(
    written: Mapping[str, Any],
) -> tuple[dict[str, Any], list[ErrorDetail], list[str]]:
    """Parse the values.

    An invalid value is kept unchanged, so that the user can correct it in the form.
    """
    config: dict[str, Any] = {}
    problems: list[ErrorDetail] = []
    notes: list[str] = []
    for key, raw in written.items():
        name = canonical_name(key)
        option = all_options().get(name)
        if name in NOT_SETTABLE and raw not in (None, ""):
            notes.append(f"{name} was skipped: it {NOT_SETTABLE[name]}")
        elif (
            key == "$schema"
            or raw is None
            or name in unsupported_options.ALWAYS_ON_OPTIONS
            or name in NOT_SETTABLE
        ):
            continue
        elif (
            option is None
            and unsupported_options.unsupported_reason(name)
            and unsupported_options.is_harmless_value(name, raw)
        ):
            notes.append(f"{name} was skipped: its value turns the feature off or has no effect")
        elif option is None:
            why = (
                unsupported_options.unsupported_reason(name)
                or f"unknown option{option_values.did_you_mean(name, all_options())}"
            )
            problems.append(ErrorDetail(loc=name, message=f"{why}; it was skipped"))
        elif has_env_placeholder(raw):
            problems.append(
                ErrorDetail(loc=name, message="{env:NAME} is not supported here; it was skipped")
            )
        else:
            try:
                value = option_values.parse_value(option, raw)
            except option_values.InvalidOptionValue as error:
                problems.append(ErrorDetail(loc=name, message=str(error)))
                value = raw
            if value is not None and value != option.default:
                config[name] = value
    return config, problems, notes
