"""Options, configurations, drafts and plans."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from simpletuner.server.wire.base import Complaint, Wire

T = TypeVar("T")
DEEPEST = 100  # levels, as in a file


def _writable(value: T) -> T:
    """JSON may hold half of a surrogate pair, which no file or answer can; and too many levels to walk."""
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels")
        if isinstance(one, str):
            one.encode("utf-8")  # its UnicodeEncodeError is a ValueError too
        elif isinstance(one, dict):
            waiting += [(item, depth + 1) for pair in one.items() for item in pair]
        elif isinstance(one, list):
            waiting += [(item, depth + 1) for item in one]
    return value


Options = Annotated[dict[str, Any], AfterValidator(_writable)]
Sets = Annotated[list[dict[str, Any]], AfterValidator(_writable)]


class OptionInfo(Wire):
    """One option of the schema. kind: flag, amount, integer, number, choice, text. level: basic, common,
    advanced. needs: shown only where every named option has one of these values."""

    name: str
    section: str
    group: str
    kind: str
    nullable: bool
    structured: bool
    choices: list[str]
    bounds: str
    takes: str
    default: Any
    text: str
    level: str
    unit: str
    path: str
    settable: bool
    needs: dict[str, list[Any]]


class Preset(Wire):
    """Settings for a card of that many GB. id: "8gb", "12gb", "16gb", "24gb", "80gb", "nano".

    planned_gb: of device memory; null for the bundled model.
    """

    id: str
    title: str
    planned_gb: float | None
    config: dict[str, Any]


class Schema(Wire):
    options: list[OptionInfo]
    dataset_fields: list[OptionInfo]
    presets: list[Preset]


class Wanted(Wire):
    """A configuration as a person writes it: options that differ, and the list of datasets."""

    config: Options
    datasets: Sets = Field(default_factory=list)


class Verdict(Wire):
    """What the reader of configurations says. changed: options that differ from their default."""

    problems: list[Complaint]
    notes: list[str]
    changed: dict[str, Any]


class Draft(Wire):
    """A configuration being written. version goes up with every change; PUT sends the one it saw."""

    id: str
    name: str
    version: int
    changed_t: float
    config: dict[str, Any]
    datasets: list[dict[str, Any]]


class DraftWrite(Wire):
    name: str
    config: Options
    datasets: Sets
    version: int | None = None


class Import(Wire):
    """text: a config.json (JSONC, TOML) or a multidatabackend.json, as read from a file."""

    name: str
    text: str


class Imported(Wire):
    config: dict[str, Any] | None
    datasets: list[dict[str, Any]] | None
    problems: list[Complaint]
    notes: list[str]


class PlanAsk(Wire):
    config: Options
    datasets: Sets = Field(default_factory=list)
    fit: str | None = None


class PlanState(Wire):
    """state "pending": ask again. plan: the object that `simpletuner plan --json` prints."""

    state: Literal["pending", "ready", "failed"]
    key: str
    plan: dict[str, Any] | None = None
    problems: list[Complaint] = Field(default_factory=list)
