"""Options, configurations, drafts and plans."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from simpletuner.server.schemas.base import ApiModel, ErrorDetail

T = TypeVar("T")
MAX_DEPTH = 100  # levels, as in a file


def _check_writable(value: T) -> T:
    """JSON may hold half of a surrogate pair, which no file or answer can; and too many levels to walk."""
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels")
        if isinstance(one, str):
            one.encode("utf-8")  # its UnicodeEncodeError is a ValueError too
        elif isinstance(one, dict):
            waiting += [(item, depth + 1) for pair in one.items() for item in pair]
        elif isinstance(one, list):
            waiting += [(item, depth + 1) for item in one]
    return value


OptionValues = Annotated[dict[str, Any], AfterValidator(_check_writable)]
DatasetEntries = Annotated[list[dict[str, Any]], AfterValidator(_check_writable)]


class OptionInfo(ApiModel):
    """One option of the schema.

    kind: flag, amount, integer, number, choice, text. level: basic, common, advanced. needs: the option is
    shown only where every option in it has one of these values; {"not": value} stands for all other values.
    needs_any: the same, for at least one of them; empty is no condition.
    """

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
    needs_any: dict[str, list[Any]]


class Preset(ApiModel):
    """Settings for a card of that many GB. id: "8gb", "12gb", "16gb", "24gb", "80gb", "nano".

    planned_gb: of device memory; null for the bundled model.
    """

    id: str
    title: str
    planned_gb: float | None
    config: dict[str, Any]


class FormSchema(ApiModel):
    options: list[OptionInfo]
    dataset_fields: list[OptionInfo]
    presets: list[Preset]


class ValidateRequest(ApiModel):
    """A configuration as a person writes it: options that differ, and the list of datasets."""

    config: OptionValues
    datasets: DatasetEntries = Field(default_factory=list)


class ConfigValidationResult(ApiModel):
    """What the reader of configurations says. changed: options that differ from their default."""

    problems: list[ErrorDetail]
    notes: list[str]
    changed: dict[str, Any]


class Draft(ApiModel):
    """A configuration being written. version goes up with every change; PUT sends the one it saw."""

    id: str
    name: str
    version: int
    changed_t: float
    config: dict[str, Any]
    datasets: list[dict[str, Any]]


class DraftWrite(ApiModel):
    name: str
    config: OptionValues
    datasets: DatasetEntries
    version: int | None = None


class ImportRequest(ApiModel):
    """text: a config.json (JSONC, TOML) or a multidatabackend.json, as read from a file."""

    name: str
    text: str


class ImportResult(ApiModel):
    config: dict[str, Any] | None
    datasets: list[dict[str, Any]] | None
    problems: list[ErrorDetail]
    notes: list[str]


class PlanRequest(ApiModel):
    config: OptionValues
    datasets: DatasetEntries = Field(default_factory=list)
    fit: str | None = None


class PlanResponse(ApiModel):
    """state "pending": ask again. plan: the object that `simpletuner plan --json` prints."""

    state: Literal["pending", "ready", "failed"]
    key: str
    plan: dict[str, Any] | None = None
    problems: list[ErrorDetail] = Field(default_factory=list)
