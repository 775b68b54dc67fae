"""What the reader of `simpletuner train` says about a configuration that came through the server.

Beside its rules: some options are not settable here, {env:NAME} is not read, and paths stay inside the
allowed folders. Nothing outside them is looked at, and nothing of the environment is in any answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simpletuner.config import rules
from simpletuner.config.catalog import aliases, catalog
from simpletuner.config.load import Attempt, Loaded, attempt_mapping, resolved
from simpletuner.config.schema import DataOptions
from simpletuner.data.backends import attempt_sets
from simpletuner.errors import Problem
from simpletuner.server.options import NOT_SETTABLE
from simpletuner.server.place import Outside, Place
from simpletuner.server.wire.base import Complaint
from simpletuner.server.wire.configs import Verdict

PLACEHOLDER = "{env:"
FOLDERS = ("instance_data_dir", "cache_dir")  # of a dataset


def judge(place: Place, config: Mapping[str, Any], datasets: Sequence[Any]) -> Verdict:
    """Every problem of both at once. Relative paths are looked for in the workspace."""
    complaints, tried = read_options(place, config)
    found, notes = _datasets(place, datasets, tried.data or DataOptions())
    loaded = tried.loaded
    if loaded is None:
        return Verdict(problems=[*complaints, *found], notes=notes, changed={})
    return Verdict(problems=[*complaints, *found], notes=[*loaded.notes, *notes], changed=changed(loaded))


def read_options(place: Place, config: Mapping[str, Any]) -> tuple[list[Complaint], Attempt]:
    """What is wrong with the options alone; and what was read of those that are not refused."""
    complaints = [*_refused(place, config)]
    refused = {complaint.loc for complaint in complaints}
    read = {name: value for name, value in config.items() if canonical(name) not in refused}
    tried = attempt_mapping(read, place.workspace)
    complaints += [complaint(problem) for problem in tried.problems]
    if tried.loaded is not None and tried.loaded.run.model.mixed_precision == "fp16":
        complaints.append(Complaint(loc="mixed_precision", message=rules.FP16.partition(": ")[2]))
    return complaints, tried


def changed(loaded: Loaded) -> dict[str, Any]:
    """What was given and is not the default."""
    now, given = resolved(loaded.run), (name for name, where in loaded.origins.items() if where != "default")
    return {name: now[name] for name in given if now[name] != catalog()[name].default}


def canonical(name: str) -> str:
    """An option's own name, however it was spelt."""
    plain = name.lstrip("-").replace("-", "_")
    return aliases().get(plain, plain)


def complaint(problem: Problem) -> Complaint:
    """With the option as loc, also where the reader knows no place: "lr_end: 1 is above ..."."""
    if problem.where:
        return Complaint(loc=canonical(problem.where), message=problem.what)
    name, colon, what = problem.what.partition(": ")
    known = bool(colon) and name in catalog()
    return Complaint(loc=name if known else "", message=what if known else problem.what)


def has_placeholder(value: Any) -> bool:
    """Whether a text somewhere inside has one, keys too."""
    return PLACEHOLDER in json.dumps(value, default=str)


def _refused(place: Place, config: Mapping[str, Any]) -> Iterator[Complaint]:
    """What the reader must not see."""
    for written, value in config.items():
        name = canonical(written)
        option = catalog().get(name)
        if name in NOT_SETTABLE and value not in (None, ""):
            yield Complaint(loc=name, message=f"cannot be set here: it {NOT_SETTABLE[name]}")
        elif has_placeholder({written: value}):
            yield Complaint(loc=name, message="{env:NAME} is not read here; write the value itself")
        elif option is not None and option.path and isinstance(value, (int, float)):
            yield Complaint(loc=name, message="must be text")  # the reader would make it a path
        elif option is not None and option.path and isinstance(value, str) and value.strip():
            try:
                place.inside(value)
            except Outside as error:
                yield Complaint(loc=name, message=str(error))


def _datasets(
    place: Place, datasets: Sequence[Any], options: DataOptions
) -> tuple[list[Complaint], list[str]]:
    """Folders are read as absolute paths of the allowed ones; in place of a refused one, the workspace."""
    found: list[Complaint] = []
    sets: list[Any] = []
    for at, entry in enumerate(datasets):
        if not isinstance(entry, Mapping):
            sets.append(entry)
            continue
        name = entry.get("id") if isinstance(entry.get("id"), str) else f"[{at}]"
        copy = dict(entry)
        for key, value in entry.items():
            if has_placeholder({key: value}):
                found.append(Complaint(loc=f"{name}.{key}", message="{env:NAME} is not read here"))
                copy.pop(key)
                if key == "instance_data_dir":
                    copy[key] = str(place.workspace)
            elif key in FOLDERS and isinstance(value, (int, float)):
                found.append(Complaint(loc=f"{name}.{key}", message="must be text"))
                copy[key] = str(place.workspace)
            elif key in FOLDERS and isinstance(value, str) and value.strip():
                try:
                    copy[key] = str(place.inside(value))
                except Outside as error:
                    found.append(Complaint(loc=f"{name}.{key}", message=str(error)))
                    copy[key] = str(place.workspace)
        sets.append(copy)
    if not sets:
        return [Complaint(loc="datasets", message="there is no dataset yet; name a folder of pictures")], []
    backends, problems = attempt_sets(sets, place.workspace, options)
    found += [
        Complaint(loc=problem.where, message=problem.what.removeprefix(f"{problem.where}: "))
        for problem in problems
    ]
    return found, list(backends.notes)
