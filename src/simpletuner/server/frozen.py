"""A configuration as it was when its job was queued: files of the job's own, without relative paths."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.config import paths
from simpletuner.config.files import read_document
from simpletuner.server.atomic import write_atomically
from simpletuner.server.judge import canonical
from simpletuner.server.place import Outside, Place
from simpletuner.server.refusal import refuse
from simpletuner.server.tail import document
from simpletuner.server.wire.configs import Draft

FOLDERS = ("instance_data_dir", "cache_dir")
LENGTHS = ("max_train_steps", "num_train_epochs")
NAME_LENGTH = 64


def folder_name(name: str) -> str:
    """What a draft's name makes as a folder: letters, digits, "." and "-", never at the start."""
    return re.sub(r"[^\w.]+", "-", name).strip("-._")[:NAME_LENGTH] or "run"


@dataclass(frozen=True)
class Frozen:
    """config: with an absolute output_dir. datasets: with absolute folders; None: those of the config."""

    config: Mapping[str, Any]
    datasets: Sequence[Mapping[str, Any]] | None

    @property
    def run_dir(self) -> Path:
        return Path(self.config["output_dir"])

    def write(self, folder: Path) -> Path:
        """config.json and multidatabackend.json; returns what --config takes."""
        folder.mkdir(parents=True)
        config = dict(self.config)
        if self.datasets is not None:
            config["data_backend_config"] = str(folder / "multidatabackend.json")
            write_atomically(folder / "multidatabackend.json", _json(self.datasets))
        write_atomically(folder / "config.json", _json(config))
        return folder / "config.json"


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def of_draft(draft: Draft, place: Place) -> Frozen:
    """Refuses (422) folders that are not allowed, by the name of their option."""
    config = {canonical(name): value for name, value in draft.config.items()}
    given = config.get("output_dir") or place.outputs / folder_name(draft.name)
    run_dir = _inside(place, given, "output_dir")
    if run_dir == place.workspace or place.own in (run_dir, *run_dir.parents):
        refuse(422, f"output_dir = {given}: a run needs a folder of its own", "output_dir")
    if (run_dir / "config.json").exists() and not (run_dir / "run.lock").exists():
        refuse(422, f"output_dir = {given}: its config.json is no run's; name another", "output_dir")

    def found(text: str, loc: str) -> str:
        return str(_inside(place, text, loc))

    return Frozen({**config, "output_dir": str(run_dir)}, _absolute(draft.datasets, found))


def _inside(place: Place, path: str | Path, loc: str) -> Path:
    try:
        return place.inside(path)
    except Outside as error:
        refuse(422, f"{loc} = {path}: {error}", loc)


def _absolute(
    datasets: Sequence[Mapping[str, Any]], found: Callable[[str, str], str]
) -> list[dict[str, Any]]:
    return [
        dict(one)
        | {key: found(str(one[key]), f"{one.get('id', '')}.{key}") for key in FOLDERS if one.get(key)}
        for one in datasets
    ]


def of_run(run_dir: Path, source: Path, max_train_steps: int | None, checkpoint: str | None) -> Frozen:
    """What a run goes on with. source: its last frozen config.json, or the one in its folder."""
    config = document(source)
    if config is None:
        refuse(409, "this run has no config.json to go on with")
    config["output_dir"] = str(run_dir)
    config["resume_from_checkpoint"] = checkpoint or "latest"
    if "***" in json.dumps(config.get("webhook_config")):  # a run folder keeps no secrets
        del config["webhook_config"]
    if max_train_steps is not None:
        config = {key: value for key, value in config.items() if key not in LENGTHS}
        config["max_train_steps"] = max_train_steps
    return Frozen(config, _datasets(config.get("data_backend_config")))


def _datasets(file: str | None) -> list[dict[str, Any]] | None:
    """As `train` reads them: folders beside the file first."""
    if file is None:
        return None
    path = Path(file)
    value = read_document(path, path.name).value

    def found(text: str, loc: str) -> str:
        return paths.find(text, path.parent, path.parent)[0] or text

    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return None
    return _absolute(value, found)
