"""Loading of a configuration: default < file < environment < flag, checked as a whole.

Every problem is reported at once, with the place where the value was given.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from simpletuner.config import (
    constraints,
    deepspeed_config,
    discovery,
    environment,
    foreign_values,
    lora_header,
    lycoris_config,
    option_values,
    paths,
)
from simpletuner.config.documents import read_document
from simpletuner.config.option_catalog import Option, all_options
from simpletuner.config.option_layers import OptionLayers, WrittenOption
from simpletuner.config.schema import DataOptions, RunConfig
from simpletuner.errors import ConfigError, Problem

DEFAULT_STEPS = 1000
MAX_LISTED_OPTIONS = 12
UNMASKED_WEBHOOK_FIELDS = ("webhook_type", "log_level", "message_prefix")


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration without errors.

    origins: option -> "config.json:7:3", "--seed", "default", ... notices: one sentence each, for
    the user. config_path: the configuration file, None without one.
    """

    config: RunConfig
    origins: Mapping[str, str]
    notices: tuple[str, ...]
    config_path: Path | None


@dataclass(frozen=True)
class ConfigLoadResult:
    """Result of loading: problems, or a valid configuration.

    data_options: the data section, if it is valid enough to check the dataset file with; else None.
    """

    problems: tuple[Problem, ...]
    loaded: LoadedConfig | None
    data_options: DataOptions | None


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

    argv_pairs: (name, value) as typed; value None is a flag without a value. needs_data: False for
    commands that train nothing, so that neither a configuration nor a dataset file has to exist.
    """
    result = try_load_config(argv_pairs, config_path, env_name, example, environ, cwd, needs_data)
    if result.loaded is None:
        raise ConfigError(result.problems)
    return result.loaded


def try_load_config(
    argv_pairs: Sequence[tuple[str, str | None]] = (),
    config_path: str | Path | None = None,
    env_name: str | None = None,
    example: str | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    needs_data: bool = True,
) -> ConfigLoadResult:
    """Load like `load_config`, but return the problems, for a caller that adds its own."""
    cwd = Path.cwd() if cwd is None else cwd
    environ = environment.copy_process_environment() if environ is None else environ
    layers = OptionLayers()
    path = None
    try:
        backend, argv_pairs = _take_config_backend(argv_pairs, environ)
        path = discovery.find_config(config_path, env_name, example, cwd, backend)
        if path is not None:
            document = read_document(path, paths.display_path(path, cwd))
            layers.add_layer(layers.read_file(document, path.parent, environ))
    except ConfigError as error:
        layers.problems.extend(error.problems)
    layers.add_layer(layers.read_environment(environ))
    layers.add_layer(layers.read_flags(argv_pairs))
    is_empty = path is None and not layers.problems and "data_backend_config" not in layers.values
    if is_empty and needs_data:
        return ConfigLoadResult((Problem("", discovery.no_config_message(cwd)),), None, None)
    return _validate_and_build(layers, path, cwd, needs_data)


def _take_config_backend(
    argv_pairs: Sequence[tuple[str, str | None]], environ: Mapping[str, str]
) -> tuple[str | None, Sequence[tuple[str, str | None]]]:
    """Return the kind of configuration file that a flag or a variable names, and other flags."""
    flags = [value for name, value in argv_pairs if name == environment.BACKEND_OPTION]
    variables = [environ.get(name, "") for name in environment.BACKEND_VARIABLES]
    named = next(filter(None, [*flags[-1:], *variables]), None)
    rest = [pair for pair in argv_pairs if pair[0] != environment.BACKEND_OPTION]
    return (named.strip().lower() if named else None), rest


def try_load_mapping(
    options: Mapping[str, Any], folder: Path, cwd: Path | None = None
) -> ConfigLoadResult:
    """Load options that are in no file yet; problems are located by the name that was given.

    folder: where relative paths are looked for before cwd. Neither the environment nor placeholders
    are read, and the dataset file need not exist.
    """
    layers = OptionLayers()
    layers.add_layer(WrittenOption(name, raw, name, folder) for name, raw in options.items())
    return _validate_and_build(layers, None, folder if cwd is None else cwd, needs_data=False)


def _validate_and_build(
    layers: OptionLayers, config_path: Path | None, cwd: Path, needs_data: bool
) -> ConfigLoadResult:
    """Resolve paths, check bounds and rules, and build the configuration."""
    standard = layers.values.get("lora_type", "standard") == "standard"
    if layers.values.get("lycoris_config") == lycoris_config.UNUSED_DEFAULT_PATH and standard:
        layers.skipped_names.append("lycoris_config")
        del layers.values["lycoris_config"]
    _read_accelerate_file(layers, cwd)
    foreign_values.read_foreign_values(layers)
    for option in all_options().values():
        if option.path and option.name in layers.values:
            _resolve_path_option(layers, option, cwd)
    data_expected = needs_data and (config_path is not None or not layers.problems)
    _set_default_dataset_file(layers, config_path, cwd, data_expected)
    _inline_file(layers, "lycoris_config", lycoris_config.read_lycoris_file)
    foreign_values.read_foreign_classes(layers)
    _inline_file(layers, "deepspeed_config", deepspeed_config.read_deepspeed_file)
    _infer_rank_from_init_lora(layers)
    run = _build_config(layers)
    given = {name: layers.origins[name] for name in layers.values if name in layers.origins}
    for name, reason in constraints.find_errors(run, given):
        # The default of an invalid option may contradict what the user meant.
        if name not in layers.invalid_names:
            layers.add_problem(given.get(name, ""), f"{name}: {reason}")
    data_is_valid = layers.invalid_names.isdisjoint(DataOptions.model_fields)
    data = run.data if data_is_valid else None
    if layers.problems:
        problems = tuple(sorted(layers.problems, key=_problem_sort_key))
        return ConfigLoadResult(problems, None, data)
    notices = [*layers.notices, *constraints.find_warnings(run, given)]
    notices += _skipped_notice(layers.skipped_names)
    if not run.training.max_train_steps and not run.training.num_train_epochs:
        notices.append(
            f"neither max_train_steps nor num_train_epochs is given: training {DEFAULT_STEPS} steps"
        )
        training = run.training.model_copy(update={"max_train_steps": DEFAULT_STEPS})
        run = run.model_copy(update={"training": training})
    origins = {name: layers.origins.get(name, "default") for name in all_options()}
    return ConfigLoadResult((), LoadedConfig(run, origins, tuple(notices), config_path), data)


def _resolve_path_option(layers: OptionLayers, option: Option, cwd: Path) -> None:
    name = option.name
    text = layers.values[name]
    if not isinstance(text, str) or (option.structured and "://" in text):
        return
    resolved, problem = paths.resolve_path(text, option.path, layers.base_folders[name], cwd)
    layers.values[name] = resolved
    if problem:
        assignment = option_values.format_assignment(option, text)
        layers.add_problem(layers.origins[name], f"{assignment}: {problem}", name)


def _skipped_notice(names: Sequence[str]) -> list[str]:
    skipped = sorted(set(names))
    if not skipped:
        return []
    hidden = len(skipped) - MAX_LISTED_OPTIONS
    more = f" and {hidden} more" if hidden > 0 else ""
    listed = ", ".join(skipped[:MAX_LISTED_OPTIONS])
    return [f"skipped, because they are off or change nothing: {listed}{more}"]


def _problem_sort_key(problem: Problem) -> tuple[float, float]:
    """Sort the problems of the file first, from top to bottom; the others stay in their order."""
    match = re.fullmatch(r".*:(\d+):(\d+)", problem.location)
    return (float(match[1]), float(match[2])) if match else (math.inf, math.inf)


def _set_default_dataset_file(
    layers: OptionLayers, config_path: Path | None, cwd: Path, needs_data: bool
) -> None:
    if "data_backend_config" in layers.values:
        return
    default = (config_path.parent if config_path else cwd) / "multidatabackend.json"
    if os.path.isfile(default):
        layers.values["data_backend_config"] = os.path.abspath(default)
    elif needs_data:
        layers.add_problem(
            "",
            f"data_backend_config: {paths.display_path(default, cwd)} does not exist; list your "
            "datasets in it, or set this option to your dataset file",
        )


def _read_accelerate_file(layers: OptionLayers, cwd: Path) -> None:
    """Put the settings of accelerate's file under the options."""
    name = "accelerate_config"
    if name not in layers.values:
        return
    location, _ = paths.find_path(layers.values[name], layers.base_folders[name], cwd)
    if location is None or not os.path.isfile(location):
        return  # reported with the other paths
    from simpletuner.config import accelerate_config  # reads YAML, which few configurations do

    path = Path(location)
    try:
        file = accelerate_config.AccelerateFile(path, paths.display_path(path, cwd))
        layers.add_lower_layer(
            WrittenOption(key.option, key.value, key.location, path.parent)
            for key in file.options()
        )
        layers.problems.extend(file.problems)
    except ConfigError as error:
        layers.problems.extend(error.problems)


def _inline_file(layers: OptionLayers, name: str, read: Callable[[str], dict[str, Any]]) -> None:
    """Replace the path that an option gives by the file's content, which is what a run records."""
    path = layers.values.get(name)
    if isinstance(path, str) and name not in layers.invalid_names:
        try:
            layers.values[name] = read(path)
        except ConfigError as error:
            layers.add_problem(layers.origins[name], f"{name}: {error}", name)


def _infer_rank_from_init_lora(layers: OptionLayers) -> None:
    """Take the rank of init_lora unless one is given.

    A rank below the file's, or another adapter type, is reported before anything is loaded.
    """
    file = layers.values.get("init_lora")
    rank = layers.values.get("lora_rank")
    if file is None or not layers.invalid_names.isdisjoint({"init_lora", "lora_rank"}):
        return
    path = Path(file)
    ranks = lora_header.read_ranks(path)
    algos = lora_header.detect_lycoris_algos(path)
    config = layers.values.get("lycoris_config")
    configured: frozenset[str] = frozenset()
    if layers.values.get("lora_type") == "lycoris" and isinstance(config, dict):
        configured = lycoris_config.algos_of(config)
    is_another_type = not algos <= configured if algos else bool(ranks.largest and configured)
    if is_another_type:
        kind = " and ".join(sorted(algos))
        setting = f'"lycoris" and algo "{kind}" in lycoris_config' if algos else '"standard"'
        layers.add_problem(
            layers.origins["init_lora"],
            f"init_lora: {path.name} is a {kind or 'LoRA'}; set lora_type {setting}",
            "init_lora",
        )
    elif rank is None and ranks.largest:
        layers.values["lora_rank"] = ranks.largest
        mixed = ranks.smallest < ranks.largest
        name = "the largest rank" if mixed else "the rank"
        others = f"; others have {ranks.smallest} or more, filled up with zeros" if mixed else ""
        layers.notices.append(f"lora_rank is {ranks.largest}, {name} of {path.name}{others}")
    elif rank is not None and rank < ranks.largest_single:
        layers.add_problem(
            layers.origins["lora_rank"],
            f"lora_rank: init_lora has rank {ranks.largest_single} and lora_rank is {rank}; leave "
            "lora_rank out, or reduce the file first: simpletuner export --format diffusers "
            "--rank N",
            "lora_rank",
        )


def _build_config(layers: OptionLayers) -> RunConfig:
    """Build the sections; a value out of bounds is reported, and its option keeps the default."""
    sections: dict[str, Any] = {}
    for section, holder in RunConfig.model_fields.items():
        model = cast(Any, holder.annotation)
        given = {name: layers.values[name] for name in model.model_fields if name in layers.values}
        sections[section] = option_values.validate_section(
            model,
            given,
            lambda name, message: layers.add_problem(layers.origins.get(name, ""), message, name),
        )
    return RunConfig(**sections)


def resolved_options(run: RunConfig) -> dict[str, Any]:
    """Return every option by name, ready for JSON, with the secrets of webhook objects masked."""
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
    """Return the configuration whose `resolved_options` are given.

    Names that this version does not know are left out. Raises ConfigError for values that are not
    valid.
    """
    layers = OptionLayers(
        {name: flat[name] for name in all_options() if flat.get(name) is not None}
    )
    run = _build_config(layers)
    if layers.problems:
        raise ConfigError(layers.problems)
    return run
