"""Messages about options, configurations, drafts and memory plans."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from simpletuner.server.schemas.base import ApiModel, ErrorDetail

T = TypeVar("T")
MAX_DEPTH = 100  # levels of nesting, the same limit as for a configuration file


def _check_writable(value: T) -> T:
    """Return `value`; raise ValueError for text that UTF-8 cannot hold and for too many levels.

    JSON can hold half of a surrogate pair, which can be written neither to a file nor to a
    response.
    """
    pending: list[tuple[Any, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels of nesting")
        if isinstance(item, str):
            item.encode("utf-8")  # UnicodeEncodeError is a ValueError
        elif isinstance(item, dict):
            pending += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            pending += [(part, depth + 1) for part in item]
    return value


OptionValues = Annotated[dict[str, Any], AfterValidator(_check_writable)]
DatasetEntries = Annotated[list[dict[str, Any]], AfterValidator(_check_writable)]


class OptionInfo(ApiModel):
    """One option of the schema.

    kind: flag, amount, count, integer, number, choice or text. level: basic, common or advanced.
    needs: the option has an effect only if every option named here has one of these values;
    {"not": value} stands for all other values. needs_any: the same for at least one of the options
    named here; empty means no condition.
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
    """Settings for a GPU with a given amount of memory.

    id: "8gb", "12gb", "16gb", "24gb", "80gb" or "nano". planned_gb: planned device memory in GB;
    null for the bundled model.
    """

    id: str
    title: str
    planned_gb: float | None
    config: dict[str, Any]


class FormSchema(ApiModel):
    """All options, dataset fields and presets."""

    options: list[OptionInfo]
    dataset_fields: list[OptionInfo]
    presets: list[Preset]


class ValidateRequest(ApiModel):
    """A configuration: the options that differ from the defaults, and the datasets."""

    config: OptionValues
    datasets: DatasetEntries = Field(default_factory=list)


class ConfigValidationResult(ApiModel):
    """Result of validating a configuration. changed: the options that differ from their default."""

    problems: list[ErrorDetail]
    notes: list[str]
    changed: dict[str, Any]


class Draft(ApiModel):
    """A configuration being edited.

    version grows with every change; PUT sends the version it is based on.
    """

    id: str
    name: str
    version: int
    changed_t: float
    config: dict[str, Any]
    datasets: list[dict[str, Any]]


class DraftWrite(ApiModel):
    """The content of a draft to create or replace. version: the version it is based on."""

    name: str
    config: OptionValues
    datasets: DatasetEntries
    version: int | None = None


class ImportRequest(ApiModel):
    """A file to import. text: a config.json (JSONC or TOML) or a multidatabackend.json."""

    name: str
    text: str


class ImportResult(ApiModel):
    """The content of an imported file, its problems, and notes about skipped options."""

    config: dict[str, Any] | None
    datasets: list[dict[str, Any]] | None
    problems: list[ErrorDetail]
    notes: list[str]


class PlanRequest(ApiModel):
    """A configuration to plan. fit: a memory size such as 12GB to find settings for."""

    config: OptionValues
    datasets: DatasetEntries = Field(default_factory=list)
    fit: str | None = None


class PlanResponse(ApiModel):
    """A memory plan.

    state "pending": request it again. plan: the output of `simpletuner plan --json`.
    """

    state: Literal["pending", "ready", "failed"]
    key: str
    plan: dict[str, Any] | None = None
    problems: list[ErrorDetail] = Field(default_factory=list)
