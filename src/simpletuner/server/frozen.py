"""A configuration as it was when its job was queued: files of the job's own, without relative paths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.config import paths
from simpletuner.config.catalog import catalog
from simpletuner.config.files import read_document
from simpletuner.durable import write_atomically
from simpletuner.server.judge import FOLDERS, canonical, judge
from simpletuner.server.options import NOT_SETTABLE
from simpletuner.server.pictures import outputs, step_of
from simpletuner.server.place import Outside, Place
from simpletuner.server.refusal import Refused, refuse
from simpletuner.server.tail import document
from simpletuner.server.wire.configs import Draft

LENGTHS = ("max_train_steps", "num_train_epochs")
NAME_LENGTH = 64


def folder_name(name: str) -> str:
    """What a draft's name makes as a folder: letters, digits, "." and "-", never at the start."""
    return re.sub(r"[^\w.]+", "-", name).strip("-._")[:NAME_LENGTH] or "run"


@dataclass(frozen=True)
class Frozen:
    """config: with an absolute output_dir. datasets: with absolute folders. left_out: what a run's own
    configuration says and the server does not take from it, with the reason.
    """

    config: Mapping[str, Any]
    datasets: Sequence[Mapping[str, Any]]
    left_out: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        return Path(self.config["output_dir"])

    def write(self, folder: Path) -> Path:
        """config.json and multidatabackend.json; returns what --config takes."""
        folder.mkdir(parents=True)
        sets = folder / "multidatabackend.json"
        write_atomically(sets, _json(self.datasets))
        write_atomically(folder / "config.json", _json({**self.config, "data_backend_config": str(sets)}))
        return folder / "config.json"


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def of_draft(draft: Draft, place: Place, trains: bool = True) -> Frozen:
    """Refuses (422) folders that are not allowed, and one that holds results already unless the draft says
    what becomes of them, by the name of their option. trains: False for a rehearsal, which writes nothing.
    """
    config = {canonical(name): value for name, value in draft.config.items()}
    loc = "output_dir" if config.get("output_dir") else "name"
    given = config.get("output_dir") or place.outputs / folder_name(draft.name)
    run_dir = _inside(place, given, "output_dir")
    if run_dir == place.workspace or place.own in (run_dir, *run_dir.parents):
        refuse(422, f"output_dir = {given}: a run needs a folder of its own", "output_dir")
    if (run_dir / "config.json").exists() and not (run_dir / "run.lock").exists():
        refuse(422, f"output_dir = {given}: its config.json is no run's; name another", "output_dir")
    if trains and config.get("resume_from_checkpoint", "latest") == "latest":
        _require_no_results(run_dir, loc)
    return Frozen({**config, "output_dir": str(run_dir)}, _absolute(draft.datasets, place))


def _require_no_results(run_dir: Path, loc: str) -> None:
    """Another training would go on from these checkpoints, or find only when it runs that it cannot."""
    newest = max(run_dir.glob("checkpoint-*"), key=step_of, default=None)
    found = newest.name if newest else next((one.path for one in outputs(run_dir)), None)
    if found is None:
        return
    go_on = f"; {newest.name} goes on from it with this configuration" if newest else ""
    refuse(
        422,
        f"{run_dir} holds the results of a run already ({found}). Choose another {loc}; or go on with that "
        f"run by Resume on its page; or set resume_from_checkpoint: never moves them aside{go_on}",
        loc,
    )


def _inside(place: Place, path: str | Path, loc: str) -> Path:
    try:
        return place.inside(path)
    except Outside as error:
        refuse(422, f"{loc} = {path}: {error}", loc)


def _absolute(datasets: Sequence[Mapping[str, Any]], place: Place) -> list[dict[str, Any]]:
    """Of sets that were judged, and may be where they are."""
    return [
        {**one, **{key: str(place.inside(one[key])) for key in FOLDERS if one.get(key)}} for one in datasets
    ]


def of_run(
    run_dir: Path, source: Path, place: Place, max_train_steps: int | None, checkpoint: str | None
) -> Frozen:
    """What a run goes on with. source: its last frozen config.json, or the one in its folder, which may come
    from anywhere: it is refused (422) what a draft is refused; what no page can set is left out.
    """
    written = document(source) or refuse(409, "this run has no config.json to go on with")
    options = catalog()
    config = {n: v for n, v in written.items() if n not in options or v != options[n].default}
    datasets = datasets_of(config, place)
    unset = [name for name in NOT_SETTABLE if config.pop(name, None) and name != "data_backend_config"]
    if max_train_steps is not None:
        config = {key: value for key, value in config.items() if key not in LENGTHS}
        config["max_train_steps"] = max_train_steps
    config |= {"output_dir": str(run_dir), "resume_from_checkpoint": checkpoint or "latest"}
    problems = judge(place, config, datasets).problems
    if problems:
        raise Refused(422, problems)
    left_out = tuple(f"{name} is left out: it {NOT_SETTABLE[name]}" for name in unset)
    return Frozen(config, _absolute(datasets, place), left_out)


def datasets_of(config: Mapping[str, Any], place: Place) -> list[Any]:
    """What the file lists that a run's configuration names, with absolute folders: as `train` finds them,
    beside the file first. Raises Refused, ConfigError.
    """
    file = config.get("data_backend_config")
    if not isinstance(file, str):
        return []
    path = _inside(place, file, "data_backend_config")
    if not path.is_file():  # a pipe would be waited for
        refuse(422, f"data_backend_config = {file}: there is no such file", "data_backend_config")
    value = read_document(path, path.name).value
    sets = value if isinstance(value, list) else [value]
    for one in sets:
        for key in FOLDERS if isinstance(one, dict) else ():
            if isinstance(one.get(key), str):
                one[key] = paths.find(one[key], path.parent, path.parent)[0] or one[key]
    return sets
