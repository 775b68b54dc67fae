"""Configurations that are being written: one JSON file each, so that a reload or a crash loses nothing."""

from __future__ import annotations

import os
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
from simpletuner.server.config_validation import canonical_name, has_env_placeholder
from simpletuner.server.form_schema import NOT_SETTABLE
from simpletuner.server.job_config import load_run_datasets
from simpletuner.server.log_reader import read_json_object
from simpletuner.server.schemas.base import ErrorDetail
from simpletuner.server.schemas.configs import Draft, DraftWrite, ImportRequest, ImportResult
from simpletuner.server.workspace import Workspace

DRAFT_ID = re.compile(r"[0-9a-f]{12}")
DRAFT_NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,79}")
# A copy of a run is another run: it gets a folder of its own and starts anew.
RUN_SPECIFIC_OPTIONS = (
    "output_dir",
    "resume_from_checkpoint",
    "data_backend_config",
    "webhook_config",
)


class DraftService:
    """The files of .simpletuner/drafts. One lock: a version is read and raised in one move."""

    def __init__(self, place: Workspace) -> None:
        self._workspace = place
        self._folder = place.server_dir / "drafts"
        self._lock = threading.Lock()

    def list_drafts(self) -> list[Draft]:
        """Newest first. A file that is no draft is passed over."""
        found = [self._read(path) for path in self._folder.glob("*.json")]
        return sorted((draft for draft in found if draft), key=lambda draft: -draft.changed_t)

    def get(self, id: str) -> Draft:
        """Refuses with 404."""
        return self._read(self._path(id)) or abort(404, "there is no such draft")

    def create(self, wanted: DraftWrite) -> Draft:
        """A new one, version 1."""
        return self._write(secrets.token_hex(6), 1, wanted)

    def update(self, id: str, wanted: DraftWrite) -> Draft:
        """Refuses with 409 when somebody else has changed it since the version that the writer saw."""
        with self._lock:
            now = self.get(id)
            if wanted.version is None:
                abort(422, "which version was changed? Send the one that was read", "version")
            if wanted.version != now.version:
                abort(409, "this draft was changed elsewhere meanwhile; load it again", "version")
            return self._write(id, now.version + 1, wanted)

    def remove(self, id: str) -> None:
        """Into the trash."""
        with self._lock:
            self.get(id)
            os.replace(self._path(id), self._workspace.make_trash_folder() / f"draft-{id}.json")

    def create_from_run(self, folder: Path) -> Draft:
        """The configuration of a run, to change and train anew; its datasets, where they may be read."""
        config = read_json_object(folder / "config.json") or abort(
            404, "this run has no readable config.json"
        )
        kept = {
            name: value
            for name, value in config.items()
            if name in all_options()
            and name not in RUN_SPECIFIC_OPTIONS
            and value != all_options()[name].default
        }
        try:
            sets = [
                one for one in load_run_datasets(config, self._workspace) if isinstance(one, dict)
            ]
        except (ApiError, ConfigError):
            sets = []
        name = folder.name if DRAFT_NAME.fullmatch(folder.name) else "copy"
        return self.create(DraftWrite(name=f"{name[:73]} copy", config=kept, datasets=sets))

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
        if not DRAFT_NAME.fullmatch(name):
            abort(422, "a name has 1 to 80 characters, no slash, and no dot in front", "name")
        draft = Draft(
            id=id,
            name=name,
            version=version,
            changed_t=time.time(),
            config=wanted.config,
            datasets=wanted.datasets,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(id), draft.model_dump_json(indent=1))
        return draft


def parse_import(given: ImportRequest) -> ImportResult:
    """A file of options or of datasets, as a draft holds it: own names, what differs, nothing unsettable."""
    try:
        value = parse_document(
            given.text, Path(given.name).suffix, Path(given.name).name or "file"
        ).value
    except ConfigError as error:
        problems = [
            ErrorDetail(loc="", message=one.message, where=one.location) for one in error.problems
        ]
        return ImportResult(config=None, datasets=None, problems=problems, notes=[])
    if isinstance(value, list):
        sets = [entry for entry in value if isinstance(entry, dict)]
        wrong = len(value) - len(sets)
        told = (
            [ErrorDetail(loc="datasets", message=f"{wrong} entries are no datasets")]
            if wrong
            else []
        )
        return ImportResult(config=None, datasets=sets, problems=told, notes=[])
    if not isinstance(value, dict):
        what = "neither an object of options nor a list of datasets"
        return ImportResult(
            config=None, datasets=None, problems=[ErrorDetail(loc="", message=what)], notes=[]
        )
    if "_metadata" in value and isinstance(value.get("config"), dict):
        value = value["config"]
    config, problems, notes = _normalize_options(value)
    return ImportResult(config=config, datasets=None, problems=problems, notes=notes)


def _normalize_options(
    written: Mapping[str, Any],
) -> tuple[dict[str, Any], list[ErrorDetail], list[str]]:
    """What cannot be read stays as it is, for the person to mend: the verdict names it."""
    config: dict[str, Any] = {}
    problems: list[ErrorDetail] = []
    notes: list[str] = []
    for key, raw in written.items():
        name = canonical_name(key)
        option = all_options().get(name)
        if name in NOT_SETTABLE and raw not in (None, ""):
            notes.append(f"{name} is left out: it {NOT_SETTABLE[name]}")
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
            notes.append(f"{name} is left out: it is off, or changes nothing")
        elif option is None:
            why = (
                unsupported_options.unsupported_reason(name)
                or f"unknown option{option_values.did_you_mean(name, all_options())}"
            )
            problems.append(ErrorDetail(loc=name, message=f"{why}; it is left out"))
        elif has_env_placeholder(raw):
            problems.append(
                ErrorDetail(loc=name, message="{env:NAME} is not read here; it is left out")
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
