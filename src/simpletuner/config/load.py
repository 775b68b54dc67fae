"""Default < file < environment < flag: one configuration out of four places, or every problem at once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from simpletuner.config import environment, lookup, lora_header, lycoris, paths, refused, rules, values
from simpletuner.config.catalog import aliases, catalog
from simpletuner.config.files import read_document
from simpletuner.config.jsonc import Document
from simpletuner.config.schema import DataOptions, RunConfig
from simpletuner.errors import ConfigError, Problem

DEFAULT_STEPS = 1000
LISTED = 12
LENGTHS = ("max_train_steps", "num_train_epochs")
PLAIN_WEBHOOK_FIELDS = ("webhook_type", "log_level", "message_prefix")


@dataclass(frozen=True)
class Loaded:
    """A configuration that holds. origins: option -> "config.json:7:3", "--seed", "default", ...

    notes: one sentence each, worth telling. source: the configuration file, None without one.
    """

    run: RunConfig
    origins: Mapping[str, str]
    notes: tuple[str, ...]
    source: Path | None


@dataclass(frozen=True)
class Attempt:
    """What came of reading. data: the data section, when it is sound enough to read the dataset file by."""

    problems: tuple[Problem, ...]
    loaded: Loaded | None
    data: DataOptions | None


@dataclass(frozen=True)
class Entry:
    """An option as somebody wrote it. raw None: not given, or a flag without a value."""

    name: str
    raw: Any
    where: str
    folder: Path | None = None


@dataclass
class _Reading:
    """The layers read so far: option -> value, and where it came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    folders: dict[str, Path | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def problem(self, where: str, what: str, option: str = "") -> None:
        self.problems.append(Problem(where, what.removeprefix(f"{where.lstrip('-')}: ")))
        self.broken.add(option)


def load(
    argv_pairs: Sequence[tuple[str, str | None]] = (),
    config_path: str | Path | None = None,
    env_name: str | None = None,
    example: str | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    needs_data: bool = True,
) -> Loaded:
    """Find, read and check the configuration. Raises ConfigError with every problem.

    argv_pairs: (name, value) as typed, value None for a bare flag. needs_data: False when nothing is trained,
    so that neither a configuration nor a dataset file has to exist.
    """
    tried = attempt(argv_pairs, config_path, env_name, example, environ, cwd, needs_data)
    if tried.loaded is None:
        raise ConfigError(tried.problems)
    return tried.loaded


def attempt(
    argv_pairs: Sequence[tuple[str, str | None]] = (),
    config_path: str | Path | None = None,
    env_name: str | None = None,
    example: str | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    needs_data: bool = True,
) -> Attempt:
    """As `load`, but hands the problems back, so that a caller can add its own to them."""
    cwd = Path.cwd() if cwd is None else cwd
    environ = environment.process_environment() if environ is None else environ
    reading = _Reading()
    source = None
    try:
        source = lookup.find_config(config_path, env_name, example, cwd)
        if source is not None:
            document = read_document(source, paths.shown(source, cwd))
            _apply(reading, _from_file(document, source.parent, environ, reading))
    except ConfigError as error:
        reading.problems.extend(error.problems)
    _apply(reading, _from_environment(environ, reading))
    _apply(reading, _from_flags(argv_pairs, reading))
    nothing = source is None and not reading.problems and "data_backend_config" not in reading.values
    if nothing and needs_data:
        return Attempt((Problem("", lookup.nothing_found(cwd)),), None, None)
    return _finish(reading, source, cwd, needs_data)


def attempt_mapping(options: Mapping[str, Any], folder: Path, cwd: Path | None = None) -> Attempt:
    """As `attempt`, of options that are in no file yet: `where` is the name they were given by.

    folder: where relative paths are looked for, before cwd. Neither the environment nor a placeholder is
    read, and the dataset file need not exist.
    """
    reading = _Reading()
    _apply(reading, [Entry(name, raw, name, folder) for name, raw in options.items()])
    return _finish(reading, None, folder if cwd is None else cwd, needs_data=False)


def _from_file(
    document: Document, folder: Path, environ: Mapping[str, str], reading: _Reading
) -> Iterable[Entry]:
    content, prefix = document.value, cast(tuple[str, ...], ())
    if isinstance(content, dict) and "_metadata" in content and isinstance(content.get("config"), dict):
        content, prefix = content["config"], ("config",)
    if not isinstance(content, dict):
        reading.problem(document.where(), "the file should hold one object, {...}, of options")
        return
    for key, raw in content.items():
        where = document.where((*prefix, key))
        if key == "$schema":
            continue
        try:
            yield Entry(key, environment.expand(raw, environ), where, folder)
        except ConfigError as error:
            reading.problem(where, f"{key}: {error}")


def _from_environment(environ: Mapping[str, str], reading: _Reading) -> Iterable[Entry]:
    """Variables that come close to an option are meant as one; others may belong to another program."""
    set_ones = (name for name in environ if name.startswith(environment.PREFIX) and environ[name].strip())
    for variable in sorted(set_ones):
        name = variable.removeprefix(environment.PREFIX).lower()
        known = name in catalog() or name in aliases() or refused.reason_refused(name)
        if known or values.did_you_mean(name, catalog(), 0.85):
            yield Entry(name, environ[variable], variable)
        else:
            reading.notes.append(f"{variable} is no option's variable and is not read")


def _from_flags(argv_pairs: Sequence[tuple[str, str | None]], reading: _Reading) -> Iterable[Entry]:
    for name, raw in argv_pairs:
        option = catalog().get(aliases().get(name, name))
        if raw is None and option is not None and option.kind not in ("flag", "amount"):
            reading.problem(f"--{name}", "needs a value")
        else:
            yield Entry(name, "true" if raw is None else raw, f"--{name}")


def _apply(reading: _Reading, layer: Iterable[Entry]) -> None:
    """Lay one source over those before it. Inside it the last word counts; an option has one name."""
    written: dict[str, str] = {}
    for entry in layer:
        name = _option_name(entry, reading)
        if name is None:
            continue
        if written.setdefault(name, entry.name) != entry.name:
            what = f"{entry.name}: {written[name]} is given too, and is the same option"
            reading.problem(entry.where, what)
            continue
        option = catalog()[name]
        reading.origins[name] = entry.where
        reading.folders[name] = entry.folder
        try:
            value = values.read(option, entry.raw)
        except values.BadValue as error:
            reading.problem(entry.where, f"{values.shown(option, entry.raw)}: {error}", name)
            value = None
        if value is None:
            reading.values.pop(name, None)
            continue
        reading.values[name] = value
        if isinstance(entry.raw, str) and entry.raw.strip().lower() in option.spellings:
            reading.notes.append(f"{entry.where}: {name} {entry.raw} is read as {value}")
    for name, other in (LENGTHS, LENGTHS[::-1]):
        if name in written and name in reading.values and other not in written and other in reading.values:
            reading.notes.append(f"{reading.origins[name]}: {name} takes the place of {other}")
            del reading.values[other], reading.origins[other]


def _option_name(entry: Entry, reading: _Reading) -> str | None:
    name = entry.name.lstrip("-").replace("-", "_")
    if name in catalog():
        return name
    if name in aliases():
        reading.notes.append(f"{entry.where}: {name} is read as {aliases()[name]}")
        return aliases()[name]
    if name in refused.ALWAYS:
        reading.notes.append(f"{entry.where}: {name} is {refused.ALWAYS[name]}")
        return None
    reason = refused.reason_refused(name)
    if reason and refused.is_harmless(name, entry.raw):
        reading.skipped.append(name)
    elif reason:
        reading.problem(entry.where, f"{name}: {reason}")
    elif name in RunConfig.model_fields and isinstance(entry.raw, dict):
        reading.problem(entry.where, f"{name}: options are written flat, without sections")
    else:
        hint = values.did_you_mean(name, [*catalog(), *aliases()])
        reading.problem(entry.where, f"{name}: unknown option{hint}")
    return None


def _finish(reading: _Reading, source: Path | None, cwd: Path, needs_data: bool) -> Attempt:
    """Resolve paths, check bounds and rules, and put the configuration together."""
    standard = reading.values.get("lora_type", "standard") == "standard"
    if reading.values.get("lycoris_config") == lycoris.UNUSED and standard:
        reading.skipped.append("lycoris_config")
        del reading.values["lycoris_config"]
    for name, option in catalog().items():
        text = reading.values.get(name)
        if option.path and isinstance(text, str) and not (option.structured and "://" in text):
            found, complaint = paths.resolve(text, option.path, reading.folders[name], cwd)
            reading.values[name] = found
            if complaint:
                reading.problem(reading.origins[name], f"{values.shown(option, text)}: {complaint}", name)
    _default_data(reading, source, cwd, needs_data and (source is not None or not reading.problems))
    _inline_lycoris(reading)
    _rank_of_init_lora(reading)
    run = _build(reading)
    data_sound = reading.broken.isdisjoint(DataOptions.model_fields)
    given = {name: reading.origins[name] for name in reading.values if name in reading.origins}
    for name, what in rules.contradictions(run, given):
        if name in reading.broken:  # its default stands in, and may contradict what the person meant
            continue
        reading.problem(given.get(name, ""), f"{name}: {what}")
    data = run.data if data_sound else None
    if reading.problems:
        return Attempt(tuple(sorted(reading.problems, key=_place)), None, data)
    notes = [*reading.notes, *rules.remarks(run, given)]
    skipped = sorted(set(reading.skipped))
    if skipped:
        more = f" and {len(skipped) - LISTED} more" if len(skipped) > LISTED else ""
        notes.append(f"skipped, as they are off or change nothing: {', '.join(skipped[:LISTED])}{more}")
    if not run.training.max_train_steps and not run.training.num_train_epochs:
        notes.append(f"neither max_train_steps nor num_train_epochs is given: {DEFAULT_STEPS} steps")
        training = run.training.model_copy(update={"max_train_steps": DEFAULT_STEPS})
        run = run.model_copy(update={"training": training})
    origins = {name: reading.origins.get(name, "default") for name in catalog()}
    return Attempt((), Loaded(run, origins, tuple(notes), source), data)


def _place(problem: Problem) -> tuple[float, float]:
    """Problems of the file first, from top to bottom; the others stay in their order."""
    match = re.fullmatch(r".*:(\d+):(\d+)", problem.where)
    return (float(match[1]), float(match[2])) if match else (math.inf, math.inf)


def _default_data(reading: _Reading, source: Path | None, cwd: Path, needs_data: bool) -> None:
    if "data_backend_config" in reading.values:
        return
    default = (source.parent if source else cwd) / "multidatabackend.json"
    if os.path.isfile(default):
        reading.values["data_backend_config"] = os.path.abspath(default)
    elif needs_data:
        what = f"{paths.shown(default, cwd)} does not exist; list your datasets there or name the file"
        reading.problem("", f"data_backend_config: {what}")


def _inline_lycoris(reading: _Reading) -> None:
    """A run keeps what its file says, not where it was."""
    name = "lycoris_config"
    if isinstance(file := reading.values.get(name), str) and name not in reading.broken:
        try:
            reading.values[name] = lycoris.read_file(file)
        except ConfigError as error:
            reading.problem(reading.origins[name], f"{name}: {error}", name)


def _rank_of_init_lora(reading: _Reading) -> None:
    """The file's rank, unless one is given; a smaller one, or another kind, is refused early."""
    file, rank = reading.values.get("init_lora"), reading.values.get("lora_rank")
    if file is None or not reading.broken.isdisjoint({"init_lora", "lora_rank"}):
        return
    largest, surely = lora_header.ranks(Path(file))
    algo, config = lora_header.algo(Path(file)), reading.values.get("lycoris_config")
    product = config if reading.values.get("lora_type") == "lycoris" and isinstance(config, dict) else {}
    if (algo or largest) and algo != product.get("algo"):
        way = f'"lycoris" and algo "{algo}" in lycoris_config' if algo else '"standard"'
        what = f"init_lora: {Path(file).name} is a {algo or 'LoRA'}; set lora_type {way}"
        reading.problem(reading.origins["init_lora"], what, "init_lora")
    elif rank is None and largest:
        reading.values["lora_rank"] = largest
        reading.notes.append(f"lora_rank is {largest}, as {Path(file).name} has it")
    elif rank is not None and rank < surely:
        way = "or make the file smaller: simpletuner export --format diffusers --rank N"
        what = f"lora_rank: init_lora has rank {surely} and lora_rank is {rank}; leave it out, {way}"
        reading.problem(reading.origins["lora_rank"], what, "lora_rank")


def _build(reading: _Reading) -> RunConfig:
    """Sections out of the values; a value that is out of bounds is reported and left at its default."""
    sections: dict[str, Any] = {}
    for section, holder in RunConfig.model_fields.items():
        model = cast(Any, holder.annotation)
        mine = {name: reading.values[name] for name in model.model_fields if name in reading.values}
        sections[section] = values.section_of(
            model, mine, lambda name, what: reading.problem(reading.origins.get(name, ""), what, name)
        )
    return RunConfig(**sections)


def resolved(run: RunConfig) -> dict[str, Any]:
    """Every option by name, ready for JSON; what a webhook object keeps to itself is masked."""
    sections = run.model_dump(mode="json").values()
    flat = {name: value for section in sections for name, value in section.items()}
    flat["webhook_config"] = _masked(flat["webhook_config"])
    return flat


def _masked(webhooks: Any) -> Any:
    if isinstance(webhooks, list):
        return [_masked(item) for item in webhooks]
    if not isinstance(webhooks, dict):
        return webhooks
    return {
        key: value if key in PLAIN_WEBHOOK_FIELDS or isinstance(value, (bool, int)) else "***"
        for key, value in webhooks.items()
    }


def from_resolved(flat: Mapping[str, Any]) -> RunConfig:
    """Back from `resolved`. Names that this version does not know are left out. Raises ConfigError."""
    reading = _Reading({name: flat[name] for name in catalog() if flat.get(name) is not None})
    run = _build(reading)
    if reading.problems:
        raise ConfigError(reading.problems)
    return run
