"""The sources of a configuration (file, environment, flags), read one over the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.config import env_file, environment, option_values, unsupported_options
from simpletuner.config.jsonc import Document, JsonPath
from simpletuner.config.option_catalog import Option, all_options, option_aliases
from simpletuner.config.schema import RunConfig
from simpletuner.errors import ConfigError, Problem

RUN_LENGTH_OPTIONS = ("max_train_steps", "num_train_epochs")
# SimpleTuner's forms save each of these together with the option that it stands for. Its value
# counts there, unless only the other one differs from the default.
OVERRIDING_ALIASES = (
    "validation_guidance",
    "optimizer_beta1",
    "optimizer_beta2",
    "optimizer_weight_decay",
)
AUTO_RATE, RATE_SEARCH = "auto", "learning_rate_search"  # learning_rate auto sets the latter
ENVIRONMENT_NAME_LIKENESS = 0.85  # similarity from which a variable is a misspelt option


@dataclass(frozen=True)
class WrittenOption:
    """An option as it was written. raw_value None: null, or a flag without a value."""

    name: str
    raw_value: Any
    location: str
    base_folder: Path | None = None


@dataclass
class OptionLayers:
    """The values of the layers read so far, and where each came from.

    skipped_names: options of SimpleTuner that change nothing. invalid_names: options whose value
    was refused.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    base_folders: dict[str, Path | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    skipped_names: list[str] = field(default_factory=list)
    invalid_names: set[str] = field(default_factory=set)
    _rate_is_auto: bool = field(default=False, init=False)

    def add_problem(self, location: str, message: str, option: str = "") -> None:
        """Record a problem; a location that the message repeats is removed from it."""
        self.problems.append(Problem(location, message.removeprefix(f"{location.lstrip('-')}: ")))
        self.invalid_names.add(option)

    def add_layer(self, layer: Iterable[WrittenOption]) -> None:
        """Put one source over those before it.

        Inside a source the last value of an option counts; two names of the same option are a
        problem.
        """
        written: dict[str, WrittenOption] = {}
        for entry in self._drop_overridden(list(layer)):
            name = self._resolve_name(entry)
            if name is None:
                continue
            first = written.setdefault(name, entry)
            if first.name != entry.name:
                # Forms save an option under both of its names.
                if first.raw_value != entry.raw_value:
                    self.add_problem(
                        entry.location,
                        f"{entry.name}: {first.name} is given too, and is the same option",
                    )
                continue
            self._set_value(all_options()[name], entry)
        for name, other in (RUN_LENGTH_OPTIONS, RUN_LENGTH_OPTIONS[::-1]):
            replaced = other not in written and other in self.values
            if name in written and name in self.values and replaced:
                self.notices.append(f"{self.origins[name]}: {name} replaces {other}")
                del self.values[other], self.origins[other]

    def _drop_overridden(self, layer: list[WrittenOption]) -> list[WrittenOption]:
        """Remove one of an overriding alias and its option, where the layer has both."""
        entries = {entry.name.lstrip("-").replace("-", "_"): entry for entry in layer}
        dropped: list[WrittenOption] = []
        for alias in OVERRIDING_ALIASES:
            option = all_options()[option_aliases()[alias]]
            if alias not in entries or option.name not in entries:
                continue
            is_default = {
                name: _means_default(option, entries[name].raw_value)
                for name in (alias, option.name)
            }
            lesser = alias if is_default[alias] and not is_default[option.name] else option.name
            other = option.name if lesser == alias else alias
            dropped.append(entries[lesser])
            if not is_default[lesser]:
                self.notices.append(
                    f"{entries[lesser].location}: {lesser} is not read, because {other} is given"
                )
        return [entry for entry in layer if entry not in dropped]

    def add_lower_layer(self, layer: Iterable[WrittenOption]) -> None:
        """Put one source under those before it: it counts where they say nothing."""
        for entry in layer:
            name = self._resolve_name(entry)
            if name is None:
                continue
            if name not in self.values:
                self._set_value(all_options()[name], entry)
                continue
            with contextlib.suppress(option_values.InvalidOptionValue):
                if (
                    option_values.parse_value(all_options()[name], entry.raw_value)
                    != (self.values[name])
                ):
                    self.notices.append(f"{self.origins[name]}: {name} replaces {entry.location}")

    def _set_value(self, option: Option, entry: WrittenOption) -> None:
        name, raw = option.name, entry.raw_value
        if name == "learning_rate":
            if self._rate_is_auto:  # this value replaces "auto" of a lower layer
                self.values.pop(RATE_SEARCH, None)
            self._rate_is_auto = isinstance(raw, str) and raw.strip().lower() == AUTO_RATE
            if self._rate_is_auto:
                self.values.pop(name, None)
                option, raw = all_options()[RATE_SEARCH], True
                name = RATE_SEARCH
        self.origins[name] = entry.location
        self.base_folders[name] = entry.base_folder
        try:
            value = option_values.parse_value(option, raw)
        except option_values.InvalidOptionValue as error:
            assignment = option_values.format_assignment(option, raw)
            self.add_problem(entry.location, f"{assignment}: {error}", name)
            value = None
        if value is None:
            self.values.pop(name, None)
            return
        self.values[name] = value
        if isinstance(raw, str) and raw.strip().lower() in option.value_aliases:
            self.notices.append(f"{entry.location}: {name} {raw} is read as {value}")

    def _resolve_name(self, entry: WrittenOption) -> str | None:
        """Return the option that is meant, or None with a problem or a notice recorded."""
        name = entry.name.lstrip("-").replace("-", "_")
        if name in all_options():
            return name
        if name in option_aliases():
            self.notices.append(f"{entry.location}: {name} is read as {option_aliases()[name]}")
            return option_aliases()[name]
        always_on = unsupported_options.always_on_reason(name)
        if always_on is not None:
            self.notices.append(f"{entry.location}: {name} is {always_on}")
            return None
        reason = unsupported_options.unsupported_reason(name)
        if reason and unsupported_options.is_harmless_value(name, entry.raw_value):
            self.skipped_names.append(name)
        elif reason and unsupported_options.is_noted(name):
            self.notices.append(f"{entry.location}: {name} {reason}")
        elif reason:
            self.add_problem(entry.location, f"{name}: {reason}")
        elif name in RunConfig.model_fields and isinstance(entry.raw_value, dict):
            self.add_problem(
                entry.location, f"{name}: options are written at the top level, without sections"
            )
        else:
            hint = option_values.did_you_mean(name, [*all_options(), *option_aliases()])
            self.add_problem(entry.location, f"{name}: unknown option{hint}")
        return None

    def read_file(
        self, document: Document, folder: Path, environ: Mapping[str, str]
    ) -> Iterable[WrittenOption]:
        """Yield the options of a configuration file.

        folder: where its relative paths are looked for.
        """
        content, prefix = _unwrap_saved_form(document.value)
        if not isinstance(content, dict):
            self.add_problem(
                document.location_of(), "the file must hold one object, {...}, of options"
            )
            return
        for key, raw in content.items():
            location = document.location_of((*prefix, key))
            if key == "$schema":
                continue
            if env_file.FOREIGN_VARIABLE_PATTERN.fullmatch(key):
                self.notices.append(
                    f"{location}: {key} is a variable of another program and is not set; set it "
                    "where you start the training"
                )
                continue
            try:
                value = environment.expand_placeholders(raw, environ)
            except ConfigError as error:
                self.add_problem(location, f"{key}: {error}")
            else:
                yield WrittenOption(key, value, location, folder)

    def read_environment(self, environ: Mapping[str, str]) -> Iterable[WrittenOption]:
        """Yield the options in SIMPLETUNER_* variables.

        A name that resembles an option is a mistake; any other name may belong to another program,
        and is reported.
        """
        for variable in sorted(environ):
            if not variable.startswith(environment.VARIABLE_PREFIX):
                continue
            if variable in environment.BACKEND_VARIABLES:
                continue
            if not environ[variable].strip():
                continue
            name = variable.removeprefix(environment.VARIABLE_PREFIX).lower()
            known = (
                name in all_options()
                or name in option_aliases()
                or unsupported_options.unsupported_reason(name)
                or option_values.did_you_mean(name, all_options(), ENVIRONMENT_NAME_LIKENESS)
            )
            if known:
                yield WrittenOption(name, environ[variable], variable)
            else:
                self.notices.append(f"{variable} is not the variable of an option and is ignored")

    def read_flags(self, argv_pairs: Sequence[tuple[str, str | None]]) -> Iterable[WrittenOption]:
        """Yield the options of the command line; a value of None is a flag that stands for true."""
        for name, raw in argv_pairs:
            option = all_options().get(option_aliases().get(name, name))
            if raw is None and option is not None and option.kind not in ("flag", "amount"):
                self.add_problem(f"--{name}", "needs a value")
            else:
                yield WrittenOption(name, "true" if raw is None else raw, f"--{name}")


def _means_default(option: Option, raw: Any) -> bool:
    """Return whether a written value is the default of its option, or not given."""
    try:
        return option_values.parse_value(option, raw) in (None, option.default)
    except option_values.InvalidOptionValue:
        return False


def _unwrap_saved_form(content: Any) -> tuple[Any, JsonPath]:
    """Return the options of a file, and the path to them.

    SimpleTuner's web form nests them in "config".
    """
    nested = isinstance(content, dict) and "_metadata" in content
    if nested and isinstance(content.get("config"), dict):
        return content["config"], ("config",)
    return content, ()
