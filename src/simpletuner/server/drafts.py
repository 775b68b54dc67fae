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

from simpletuner.config import refused, values
from simpletuner.config.catalog import catalog
from simpletuner.config.files import parse_document
from simpletuner.durable import write_atomically
from simpletuner.errors import ConfigError
from simpletuner.server.frozen import datasets_of
from simpletuner.server.judge import canonical, has_placeholder
from simpletuner.server.options import NOT_SETTABLE
from simpletuner.server.place import Place
from simpletuner.server.refusal import Refused, refuse
from simpletuner.server.tail import document
from simpletuner.server.wire.base import Complaint
from simpletuner.server.wire.configs import Draft, DraftWrite, Import, Imported

ID = re.compile(r"[0-9a-f]{12}")
NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,79}")
# A copy of a run is another run: it gets a folder of its own and starts anew.
RUNS_OWN = ("output_dir", "resume_from_checkpoint", "data_backend_config", "webhook_config")


class Drafts:
    """The files of .simpletuner/drafts. One lock: a version is read and raised in one move."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._folder = place.own / "drafts"
        self._lock = threading.Lock()

    def all(self) -> list[Draft]:
        """Newest first. A file that is no draft is passed over."""
        found = [self._read(path) for path in self._folder.glob("*.json")]
        return sorted((draft for draft in found if draft), key=lambda draft: -draft.changed_t)

    def get(self, id: str) -> Draft:
        """Refuses with 404."""
        return self._read(self._path(id)) or refuse(404, "there is no such draft")

    def create(self, wanted: DraftWrite) -> Draft:
        """A new one, version 1."""
        return self._write(secrets.token_hex(6), 1, wanted)

    def write(self, id: str, wanted: DraftWrite) -> Draft:
        """Refuses with 409 when somebody else has changed it since the version that the writer saw."""
        with self._lock:
            now = self.get(id)
            if wanted.version is None:
                refuse(422, "which version was changed? Send the one that was read", "version")
            if wanted.version != now.version:
                refuse(409, "this draft was changed elsewhere meanwhile; load it again", "version")
            return self._write(id, now.version + 1, wanted)

    def remove(self, id: str) -> None:
        """Into the trash."""
        with self._lock:
            self.get(id)
            os.replace(self._path(id), self._place.trash() / f"draft-{id}.json")

    def of_run(self, folder: Path) -> Draft:
        """The configuration of a run, to change and train anew; its datasets, where they may be read."""
        config = document(folder / "config.json") or refuse(404, "this run has no readable config.json")
        kept = {
            name: value
            for name, value in config.items()
            if name in catalog() and name not in RUNS_OWN and value != catalog()[name].default
        }
        try:
            sets = [one for one in datasets_of(config, self._place) if isinstance(one, dict)]
        except (Refused, ConfigError):
            sets = []
        name = folder.name if NAME.fullmatch(folder.name) else "copy"
        return self.create(DraftWrite(name=f"{name[:73]} copy", config=kept, datasets=sets))

    def _path(self, id: str) -> Path:
        if not ID.fullmatch(id):
            refuse(404, "there is no such draft")
        return self._folder / f"{id}.json"

    def _read(self, path: Path) -> Draft | None:
        try:
            return Draft.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None

    def _write(self, id: str, version: int, wanted: DraftWrite) -> Draft:
        name = wanted.name.strip()
        if not NAME.fullmatch(name):
            refuse(422, "a name has 1 to 80 characters, no slash, and no dot in front", "name")
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


def imported(given: Import) -> Imported:
    """A file of options or of datasets, as a draft holds it: own names, what differs, nothing unsettable."""
    try:
        value = parse_document(given.text, Path(given.name).suffix, Path(given.name).name or "file").value
    except ConfigError as error:
        problems = [Complaint(loc="", message=one.what, where=one.where) for one in error.problems]
        return Imported(config=None, datasets=None, problems=problems, notes=[])
    if isinstance(value, list):
        sets = [entry for entry in value if isinstance(entry, dict)]
        wrong = len(value) - len(sets)
        told = [Complaint(loc="datasets", message=f"{wrong} entries are no datasets")] if wrong else []
        return Imported(config=None, datasets=sets, problems=told, notes=[])
    if not isinstance(value, dict):
        what = "neither an object of options nor a list of datasets"
        return Imported(config=None, datasets=None, problems=[Complaint(loc="", message=what)], notes=[])
    if "_metadata" in value and isinstance(value.get("config"), dict):
        value = value["config"]
    config, problems, notes = _tidied(value)
    return Imported(config=config, datasets=None, problems=problems, notes=notes)


def _tidied(written: Mapping[str, Any]) -> tuple[dict[str, Any], list[Complaint], list[str]]:
    """What cannot be read stays as it is, for the person to mend: the verdict names it."""
    config: dict[str, Any] = {}
    problems: list[Complaint] = []
    notes: list[str] = []
    for key, raw in written.items():
        name = canonical(key)
        option = catalog().get(name)
        if name in NOT_SETTABLE and raw not in (None, ""):
            notes.append(f"{name} is left out: it {NOT_SETTABLE[name]}")
        elif key == "$schema" or raw is None or name in refused.ALWAYS or name in NOT_SETTABLE:
            continue
        elif option is None and refused.reason_refused(name) and refused.is_harmless(name, raw):
            notes.append(f"{name} is left out: it is off, or changes nothing")
        elif option is None:
            why = refused.reason_refused(name) or f"unknown option{values.did_you_mean(name, catalog())}"
            problems.append(Complaint(loc=name, message=f"{why}; it is left out"))
        elif has_placeholder(raw):
            problems.append(Complaint(loc=name, message="{env:NAME} is not read here; it is left out"))
        else:
            try:
                value = values.read(option, raw)
            except values.BadValue as error:
                problems.append(Complaint(loc=name, message=str(error)))
                value = raw
            if value is not None and value != option.default:
                config[name] = value
    return config, problems, notes
