"""How an option is declared: type by annotation, everything else by `option(...)`, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

OptionLevel = Literal["basic", "common", "advanced"]
ResumePolicy = Literal["fixed", "free"]
PathKind = Literal["", "file", "hub", "new"]


class OptionSection(BaseModel):
    """A group of options. Frozen; unknown names are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        validate_default=True,
    )


def option(
    default: Any,
    text: str,
    *,
    level: OptionLevel = "advanced",
    unit: str = "",
    resume_policy: ResumePolicy = "fixed",
    path: PathKind = "",
    aliases: tuple[str, ...] = (),
    value_aliases: Mapping[str, str] | None = None,
    refused_values: Mapping[str, str] | None = None,
    zero_is_null: bool = False,
    **bounds: Any,
) -> Any:
    """Declare one option.

    text: one help sentence. resume_policy: "free" when it may change between a checkpoint and its resumption.
    path: "file" must exist, "hub" may instead be a repository id; both are looked up beside the config
    file first; "new" need not exist, only ~ is read. aliases, value_aliases: other names and values, read with
    a note. refused_values: values refused with a reason of their own. zero_is_null: 0 means "not given".
    bounds: gt, ge, lt, le, pattern.
    """
    extra: dict[str, Any] = {
        "level": level,
        "unit": unit,
        "resume_policy": resume_policy,
        "path": path,
        "zero_is_null": zero_is_null,
        "aliases": list(aliases),
        "value_aliases": dict(value_aliases or {}),
        "refused_values": dict(refused_values or {}),
    }
    return Field(default, description=text, json_schema_extra=extra, **bounds)
