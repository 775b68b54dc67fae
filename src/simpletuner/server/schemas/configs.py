"""Messages about options, configurations, drafts and memory plans."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from simpletuner.server.schemas.base import ApiModel, ErrorDetail, Message

T = TypeVar("T")
SIDE_PX = r"(6[4-9]|[7-9]\d|[1-9]\d\d|[1-3]\d\d\d|40[0-8]\d|409[0-6])"  # 64 to 4096
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


def _check_unique_names(prompts: list[PromptEntry]) -> list[PromptEntry]:
    names = [prompt.name.casefold() for prompt in prompts]
    if len(set(names)) != len(names):
        raise ValueError("two prompts have the same name")
    return prompts


OptionValues = Annotated[dict[str, Any], AfterValidator(_check_writable)]
DatasetEntries = Annotated[list[dict[str, Any]], AfterValidator(_check_writable)]


class OptionInfo(ApiModel):
    """One option of the schema.

    kind: flag, amount, count, integer, number, choice or text. level: basic, common or advanced.
    aliases: other names that are accepted. needs: the option has an effect only if every option
    named here has one of these values; {"not": value} stands for all other values. needs_any: the
    same for at least one of the options named here; empty means no condition.
    """

    name: str
    section: str
    group: str
    kind: str
    nullable: bool
    structured: bool
    choices: list[str]
    bounds: Message
    takes: str
    default: Any
    text: str
    level: str
    unit: Message
    path: str
    aliases: list[str]
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
    """A configuration: the options that differ from the defaults, and the datasets.

    name: the name of the draft, from which the run folder gets its name.
    """

    config: OptionValues
    datasets: DatasetEntries = Field(default_factory=list)
    name: str = ""


class ConfigValidationResult(ApiModel):
    """Result of validating a configuration.

    problems: prevent the start. warnings: the user should know them before the start. changed: the
    options that differ from their default. run_dir: the folder that the run will be written to, ""
    if it is not known. captions: some captions of the datasets, as suggestions for prompts.
    """

    problems: list[ErrorDetail]
    notes: list[Message]
    changed: dict[str, Any]
    warnings: list[ErrorDetail] = Field(default_factory=list)
    run_dir: str = ""
    captions: list[str] = Field(default_factory=list)


class PromptEntry(ApiModel):
    """A prompt of the validation images.

    seed: None for that of the run. size: "512" or "512x768" px, "" for those of the run.
    adapter_strength: multiplies that of the adapter.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,48}$")
    prompt: str = Field(min_length=1, max_length=4000)
    negative_prompt: str = Field(default="", max_length=4000)
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    size: str = Field(default="", pattern=rf"^({SIDE_PX}(x{SIDE_PX})?)?$")
    adapter_strength: float = Field(default=1.0, ge=-10, le=10)


PromptEntries = Annotated[
    list[PromptEntry], Field(max_length=200), AfterValidator(_check_unique_names)
]


class Draft(ApiModel):
    """A configuration being edited.

    version grows with every change; PUT sends the version it is based on. prompts: of the
    validation images, besides validation_prompt.
    """

    id: str
    name: str
    version: int
    changed_t: float
    config: dict[str, Any]
    datasets: list[dict[str, Any]]
    prompts: list[PromptEntry] = Field(default_factory=list)


class DraftWrite(ApiModel):
    """The content of a draft to create or replace. version: the version it is based on."""

    name: str
    config: OptionValues
    datasets: DatasetEntries
    version: int | None = None
    prompts: PromptEntries = Field(default_factory=list)


class ImportRequest(ApiModel):
    """A file to import. text: a config.json (JSONC or TOML) or a multidatabackend.json."""

    name: str
    text: str


class ImportResult(ApiModel):
    """The content of an imported file, its problems, and notes about skipped options."""

    config: dict[str, Any] | None
    datasets: list[dict[str, Any]] | None
    problems: list[ErrorDetail]
    notes: list[Message]


class PlanRequest(ApiModel):
    """A configuration to plan. fit: a memory size such as 12GB to find settings for."""

    config: OptionValues
    datasets: DatasetEntries = Field(default_factory=list)
    fit: str | None = None


class PlanResponse(ApiModel):
    """A memory plan.

    state "pending": request it again. plan: the output of `simpletuner plan --json`. progress: the
    last line that the planning process has printed. running_s: seconds since it started.
    correction: measured by estimated time of a step, in the newest run of the same flavour, or
    None. corrected_by: the name of that run.
    """

    state: Literal["pending", "ready", "failed"]
    key: str
    plan: dict[str, Any] | None = None
    progress: str = ""
    running_s: float = 0.0
    correction: float | None = None
    corrected_by: str = ""
    problems: list[ErrorDetail] = Field(default_factory=list)
