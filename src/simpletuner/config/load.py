"""Default < file < environment < flag: one configuration out of four places, or every problem at once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from simpletuner.config import (
    constraints,
    discovery,
    environment,
    lora_header,
    lycoris_config,
    option_values,
    paths,
    unsupported_options,
)
from simpletuner.config.documents import read_document
from simpletuner.config.jsonc import Document
from simpletuner.config.option_catalog import all_options, option_aliases
from simpletuner.config.schema import DataOptions, RunConfig
from simpletuner.errors import ConfigError, Problem

DEFAULT_STEPS = 1000
MAX_LISTED_OPTIONS = 12
RUN_LENGTH_OPTIONS = ("max_train_steps", "num_train_epochs")
UNMASKED_WEBHOOK_FIELDS = ("webhook_type", "log_level", "message_prefix")


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that holds. origins: option -> "config.json:7:3", "--seed", "default", ...

    notes: one sentence each, worth telling. source: the configuration file, None without one.
    """

    config: RunConfig
    origins: Mapping[str, str]
    notices: tuple[str, ...]
    config_path: Path | None


@dataclass(frozen=True)
class ConfigLoadResult:
    """What came of reading. data: the data section, when it is sound enough to read the dataset file by."""

    problems: tuple[Problem, ...]
    loaded: LoadedConfig | None
    data_options: DataOptions | None


@dataclass(frozen=True)
class WrittenOption:
    """An option as somebody wrote it. raw None: not given, or a flag without a value."""

    name: str
    raw_value: Any
    location: str
    base_folder: Path | None = None


@dataclass
class _LayeredOptions:
    """The layers read so far: option -> value, and where it came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    base_folders: dict[str, Path | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    skipped_names: list[str] = field(default_factory=list)
    invalid_names: set[str] = field(default_factory=set)

    def add_problem(self, where: str, what: str, option: str = "") -> None:
        self.problems.append(Problem(where, what.removeprefix(f"{where.lstrip('-')}: ")))
        self.invalid_names.add(option)


def load_config(
    argv_pairs: Sequence[tuple[str, str | None]] = (),
    config_path: str | Path | None = None,
    env_name: str | None = None,
    example: str | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    needs_data: bool = True,
) -> LoadedConfig:
    """Find, read and check the configuration. Raises ConfigError with every problem.

    argv_pairs: (name, value) as typed, value None for a bare flag. needs_data: False when nothing is trained,
    so that neither a configuration nor a dataset file has to exist.
    """
    tried = try_load_config(argv_pairs, config_path, env_name, example, environ, cwd, needs_data)
    if tried.loaded is None:
        raise ConfigError(tried.problems)
    return tried.loaded


def try_load_config(
    argv_pairs: Sequence[tuple[str, str | None]] = (),
    config_path: str | Path | None = None,
    env_name: str | None = None,
    example: str | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    needs_data: bool = True,
) -> ConfigLoadResult:
    """As `load`, but hands the problems back, so that a caller can add its own to them."""
    cwd = Path.cwd() if cwd is None else cwd
    environ = environment.copy_process_environment() if environ is None else environ
    reading = _LayeredOptions()
    source = None
    try:
        source = discovery.find_config(config_path, env_name, example, cwd)
        if source is not None:
            document = read_document(source, paths.display_path(source, cwd))
            _apply_layer(reading, _options_from_file(document, source.parent, environ, reading))
    except ConfigError as error:
        reading.problems.extend(error.problems)
    _apply_layer(reading, _options_from_environment(environ, reading))
    _apply_layer(reading, _options_from_flags(argv_pairs, reading))
    nothing = (
        source is None and not reading.problems and "data_backend_config" not in reading.values
    )
    if nothing and needs_data:
        return ConfigLoadResult((Problem("", discovery.no_config_message(cwd)),), None, None)
    return _validate_and_build(reading, source, cwd, needs_data)


def try_load_mapping(
    options: Mapping[str, Any], folder: Path, cwd: Path | None = None
) -> ConfigLoadResult:
    """As `attempt`, of options that are in no file yet: `where` is the name they were given by.

    folder: where relative paths are looked for, before cwd. Neither the environment nor a placeholder is
    read, and the dataset file need not exist.
    """
    reading = _LayeredOptions()
    _apply_layer(reading, [WrittenOption(name, raw, name, folder) for name, raw in options.items()])
    return _validate_and_build(reading, None, folder if cwd is None else cwd, needs_data=False)


def _options_from_file(
    document: Document, folder: Path, environ: Mapping[str, str], reading: _LayeredOptions
) -> Iterable[WrittenOption]:
    content, prefix = document.value, cast(tuple[str, ...], ())
    if (
        isinstance(content, dict)
        and "_metadata" in content
        and isinstance(content.get("config"), dict)
    ):
        content, prefix = content["config"], ("config",)
    if not isinstance(content, dict):
        reading.add_problem(
            document.location_of(), "the file should hold one object, {...}, of options"
        )
        return
    for key, raw in content.items():
        where = document.location_of((*prefix, key))
        if key == "$schema":
            continue
        try:
            yield WrittenOption(key, environment.expand_placeholders(raw, environ), where, folder)
        except ConfigError as error:
            reading.add_problem(where, f"{key}: {error}")


def _options_from_environment(
    environ: Mapping[str, str], reading: _LayeredOptions
) -> Iterable[WrittenOption]:
    """Variables that come close to an option are meant as one; others may belong to another program."""
    set_ones = (
        name
        for name in environ
        if name.startswith(environment.VARIABLE_PREFIX) and environ[name].strip()
    )
    for variable in sorted(set_ones):
        name = variable.removeprefix(environment.VARIABLE_PREFIX).lower()
        known = (
            name in all_options()
            or name in option_aliases()
            or unsupported_options.unsupported_reason(name)
        )
        if known or option_values.did_you_mean(name, all_options(), 0.85):
            yield WrittenOption(name, environ[variable], variable)
        else:
            reading.notices.append(f"{variable} is no option's variable and is not read")


def _options_from_flags(
    argv_pairs: Sequence[tuple[str, str | None]], reading: _LayeredOptions
) -> Iterable[WrittenOption]:
    for name, raw in argv_pairs:
        option = all_options().get(option_aliases().get(name, name))
        if raw is None and option is not None and option.kind not in ("flag", "amount"):
            reading.add_problem(f"--{name}", "needs a value")
        else:
            yield WrittenOption(name, "true" if raw is None else raw, f"--{name}")


def _apply_layer(reading: _LayeredOptions, layer: Iterable[WrittenOption]) -> None:
    """Lay one source over those before it. Inside it the last word counts; an option has one name."""
    written: dict[str, str] = {}
    for entry in layer:
        name = _resolve_option_name(entry, reading)
        if name is None:
            continue
        if written.setdefault(name, entry.name) != entry.name:
            what = f"{entry.name}: {written[name]} is given too, and is the same option"
            reading.add_problem(entry.location, what)
            continue
        option = all_options()[name]
        reading.origins[name] = entry.location
        reading.base_folders[name] = entry.base_folder
        try:
            value = option_values.parse_value(option, entry.raw_value)
        except option_values.InvalidOptionValue as error:
            reading.add_problem(
                entry.location,
                f"{option_values.format_assignment(option, entry.raw_value)}: {error}",
                name,
            )
            value = None
        if value is None:
            reading.values.pop(name, None)
            continue
        reading.values[name] = value
        if (
            isinstance(entry.raw_value, str)
            and entry.raw_value.strip().lower() in option.value_aliases
        ):
            reading.notices.append(f"{entry.location}: {name} {entry.raw_value} is read as {value}")
    for name, other in (RUN_LENGTH_OPTIONS, RUN_LENGTH_OPTIONS[::-1]):
        if (
            name in written
            and name in reading.values
            and other not in written
            and other in reading.values
        ):
            reading.notices.append(f"{reading.origins[name]}: {name} takes the place of {other}")
            del reading.values[other], reading.origins[other]


def _resolve_option_name(entry: WrittenOption, reading: _LayeredOptions) -> str | None:
    name = entry.name.lstrip("-").replace("-", "_")
    if name in all_options():
        return name
    if name in option_aliases():
        reading.notices.append(f"{entry.location}: {name} is read as {option_aliases()[name]}")
        return option_aliases()[name]
    if name in unsupported_options.ALWAYS_ON_OPTIONS:
        reading.notices.append(
            f"{entry.location}: {name} is {unsupported_options.ALWAYS_ON_OPTIONS[name]}"
        )
        return None
    reason = unsupported_options.unsupported_reason(name)
    if reason and unsupported_options.is_harmless_value(name, entry.raw_value):
        reading.skipped_names.append(name)
    elif reason:
        reading.add_problem(entry.location, f"{name}: {reason}")
    elif name in RunConfig.model_fields and isinstance(entry.raw_value, dict):
        reading.add_problem(entry.location, f"{name}: options are written flat, without sections")
    else:
        hint = option_values.did_you_mean(name, [*all_options(), *option_aliases()])
        reading.add_problem(entry.location, f"{name}: unknown option{hint}")
    return None


def _validate_and_build(
    reading: _LayeredOptions, source: Path | None, cwd: Path, needs_data: bool
) -> ConfigLoadResult:
    """Resolve paths, check bounds and rules, and put the configuration together."""
    standard = reading.values.get("lora_type", "standard") == "standard"
    if reading.values.get("lycoris_config") == lycoris_config.UNUSED_DEFAULT_PATH and standard:
        reading.skipped_names.append("lycoris_config")
        del reading.values["lycoris_config"]
    for name, option in all_options().items():
        text = reading.values.get(name)
        if option.path and isinstance(text, str) and not (option.structured and "://" in text):
            found, complaint = paths.resolve_path(
                text, option.path, reading.base_folders[name], cwd
            )
            reading.values[name] = found
            if complaint:
                reading.add_problem(
                    reading.origins[name],
                    f"{option_values.format_assignment(option, text)}: {complaint}",
                    name,
                )
    _set_default_dataset_file(
        reading, source, cwd, needs_data and (source is not None or not reading.problems)
    )
    _inline_lycoris_config(reading)
    _infer_rank_from_init_lora(reading)
    run = _build_config(reading)
    data_sound = reading.invalid_names.isdisjoint(DataOptions.model_fields)
    given = {name: reading.origins[name] for name in reading.values if name in reading.origins}
    for name, what in constraints.find_errors(run, given):
        if (
            name in reading.invalid_names
        ):  # its default stands in, and may contradict what the person meant
            continue
        reading.add_problem(given.get(name, ""), f"{name}: {what}")
    data = run.data if data_sound else None
    if reading.problems:
        return ConfigLoadResult(tuple(sorted(reading.problems, key=_problem_sort_key)), None, data)
    notes = [*reading.notices, *constraints.find_warnings(run, given)]
    skipped = sorted(set(reading.skipped_names))
    if skipped:
        more = (
            f" and {len(skipped) - MAX_LISTED_OPTIONS} more"
            if len(skipped) > MAX_LISTED_OPTIONS
            else ""
        )
        notes.append(
            f"skipped, as they are off or change nothing: {', '.join(skipped[:MAX_LISTED_OPTIONS])}{more}"
        )
    if not run.training.max_train_steps and not run.training.num_train_epochs:
        notes.append(
            f"neither max_train_steps nor num_train_epochs is given: {DEFAULT_STEPS} steps"
        )
        training = run.training.model_copy(update={"max_train_steps": DEFAULT_STEPS})
        run = run.model_copy(update={"training": training})
    origins = {name: reading.origins.get(name, "default") for name in all_options()}
    return ConfigLoadResult((), LoadedConfig(run, origins, tuple(notes), source), data)


def _problem_sort_key(problem: Problem) -> tuple[float, float]:
    """Problems of the file first, from top to bottom; the others stay in their order."""
    match = re.fullmatch(r".*:(\d+):(\d+)", problem.location)
    return (float(match[1]), float(match[2])) if match else (math.inf, math.inf)


def _set_default_dataset_file(
    reading: _LayeredOptions, source: Path | None, cwd: Path, needs_data: bool
) -> None:
    if "data_backend_config" in reading.values:
        return
    default = (source.parent if source else cwd) / "multidatabackend.json"
    if os.path.isfile(default):
        reading.values["data_backend_config"] = os.path.abspath(default)
    elif needs_data:
        what = f"{paths.display_path(default, cwd)} does not exist; list your datasets there or name the file"
        reading.add_problem("", f"data_backend_config: {what}")


def _inline_lycoris_config(reading: _LayeredOptions) -> None:
    """A run keeps what its file says, not where it was."""
    name = "lycoris_config"
    if isinstance(file := reading.values.get(name), str) and name not in reading.invalid_names:
        try:
            reading.values[name] = lycoris_config.read_lycoris_file(file)
        except ConfigError as error:
            reading.add_problem(reading.origins[name], f"{name}: {error}", name)


def _infer_rank_from_init_lora(reading: _LayeredOptions) -> None:
    """The file's rank, unless one is given; a smaller one, or another kind, is refused early."""
    file, rank = reading.values.get("init_lora"), reading.values.get("lora_rank")
    if file is None or not reading.invalid_names.isdisjoint({"init_lora", "lora_rank"}):
        return
    largest, surely = lora_header.read_ranks(Path(file))
    algo, config = lora_header.detect_lycoris_algo(Path(file)), reading.values.get("lycoris_config")
    product = (
        config if reading.values.get("lora_type") == "lycoris" and isinstance(config, dict) else {}
    )
    if (algo or largest) and algo != product.get("algo"):
        way = f'"lycoris" and algo "{algo}" in lycoris_config' if algo else '"standard"'
        what = f"init_lora: {Path(file).name} is a {algo or 'LoRA'}; set lora_type {way}"
        reading.add_problem(reading.origins["init_lora"], what, "init_lora")
    elif rank is None and largest:
        reading.values["lora_rank"] = largest
        reading.notices.append(f"lora_rank is {largest}, as {Path(file).name} has it")
    elif rank is not None and rank < surely:
        way = "or make the file smaller: simpletuner export --format diffusers --rank N"
        what = (
            f"lora_rank: init_lora has rank {surely} and lora_rank is {rank}; leave it out, {way}"
        )
        reading.add_problem(reading.origins["lora_rank"], what, "lora_rank")


def _build_config(reading: _LayeredOptions) -> RunConfig:
    """Sections out of the values; a value that is out of bounds is reported and left at its default."""
    sections: dict[str, Any] = {}
    for section, holder in RunConfig.model_fields.items():
        model = cast(Any, holder.annotation)
        mine = {name: reading.values[name] for name in model.model_fields if name in reading.values}
        sections[section] = option_values.validate_section(
            model,
            mine,
            lambda name, what: reading.add_problem(reading.origins.get(name, ""), what, name),
        )
    return RunConfig(**sections)


def resolved_options(run: RunConfig) -> dict[str, Any]:
    """Every option by name, ready for JSON; what a webhook object keeps to itself is masked."""
    sections = run.model_dump(mode="json").values()
    flat = {name: value for section in sections for name, value in section.items()}
    flat["webhook_config"] = _mask_webhook_secrets(flat["webhook_config"])
    return flat


def _mask_webhook_secrets(webhooks: Any) -> Any:
    if isinstance(webhooks, list):
        return [_mask_webhook_secrets(item) for item in webhooks]
    if not isinstance(webhooks, dict):
        return webhooks
    return {
        key: value if key in UNMASKED_WEBHOOK_FIELDS or isinstance(value, (bool, int)) else "***"
        for key, value in webhooks.items()
    }


def config_from_resolved(flat: Mapping[str, Any]) -> RunConfig:
    """Back from `resolved`. Names that this version does not know are left out. Raises ConfigError."""
    reading = _LayeredOptions(
        {name: flat[name] for name in all_options() if flat.get(name) is not None}
    )
    run = _build_config(reading)
    if reading.problems:
        raise ConfigError(reading.problems)
    return run
