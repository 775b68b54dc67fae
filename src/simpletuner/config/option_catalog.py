"""All options as a flat table, for the reader, the documentation and the command line."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Annotated, Any, Literal, cast

from pydantic.fields import FieldInfo

from simpletuner.config.option import OptionNeeds, OptionSection, describe_needs, parse_needs
from simpletuner.config.schema import RunConfig

OptionKind = Literal["flag", "amount", "count", "integer", "number", "choice", "text"]
BOUND_PHRASES = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


@dataclass(frozen=True)
class Option:
    """One declaration of the schema, flattened.

    structured: a text that may also be a list or an object. takes_objects: it may be an object.
    """

    name: str
    section: str
    group: str
    kind: OptionKind
    nullable: bool
    structured: bool
    takes_objects: bool
    choices: tuple[str, ...]
    bounds: str
    default: Any
    text: str
    level: str
    unit: str
    resume_policy: str
    path: str
    aliases: tuple[str, ...]
    value_aliases: Mapping[str, str]
    refused_values: Mapping[str, str]
    zero_is_null: bool
    needs: OptionNeeds
    unmet_errors: Mapping[str, str]
    idle_value: Any
    affects: frozenset[str]

    @property
    def needs_text(self) -> str:
        """Return "model_type lora; lora_type standard"; "" if the option always has an effect."""
        return "; ".join(describe_needs(group) for group in self.needs)

    @property
    def takes(self) -> str:
        """Return what may be written: "integer, at least 1, or null"."""
        kind = " | ".join(self.choices) or ("true | false" if self.kind == "flag" else self.kind)
        if self.kind == "amount":
            kind = f"true | false | {kind} | integer"
        if self.kind == "count":
            kind = f"integer | {kind}"
        parts = [kind + (", list or object" if self.structured else "")]
        if self.bounds:
            parts.append(self.bounds)
        return ", ".join(parts) + (", or null" if self.nullable else "")


@functools.cache
def all_options() -> Mapping[str, Option]:
    """Return every option by name, in the order of the schema."""
    table: dict[str, Option] = {}
    for section, holder in RunConfig.model_fields.items():
        options = section_options(section, cast(Any, holder.annotation))
        assert table.keys().isdisjoint(options)
        table |= options
    return types.MappingProxyType(table)


def section_options(section: str, model: type[OptionSection]) -> dict[str, Option]:
    """Return the options of one section by name, in their order."""
    group = (model.__doc__ or section).rstrip(".")
    return {
        name: _make_option(name, section, group, field, model)
        for name, field in model.model_fields.items()
    }


@functools.cache
def option_aliases() -> Mapping[str, str]:
    """Return the option of each alias."""
    return types.MappingProxyType(
        {alias: option.name for option in all_options().values() for alias in option.aliases}
    )


def _make_option(
    name: str, section: str, group: str, field: FieldInfo, model: type[OptionSection]
) -> Option:
    extra = dict(cast(dict[str, Any], field.json_schema_extra))
    needs, needs_any, affects = (extra.pop(key) for key in ("needs", "needs_any", "affects"))
    if needs is None and needs_any is None:
        needs = model.shared_needs
    origin = typing.get_origin(field.annotation)
    union = origin in (typing.Union, types.UnionType)
    members = typing.get_args(field.annotation) if union else (field.annotation,)
    kinds = [member for member in members if member is not type(None)]
    literals = [
        value
        for kind in kinds
        if typing.get_origin(kind) is Literal
        for value in typing.get_args(kind)
    ]
    return Option(
        name=name,
        section=section,
        group=group,
        kind=_option_kind(kinds, literals),
        nullable=type(None) in members,
        structured=any(typing.get_origin(kind) in (list, dict) for kind in kinds),
        takes_objects=any(typing.get_origin(kind) is dict for kind in kinds),
        choices=tuple(str(value).lower() for value in literals),
        bounds=_format_bounds(field),
        default=field.default,
        text=field.description or "",
        needs=parse_needs(needs or {}, needs_any or {}),
        affects=frozenset(model.shared_affects if affects is None else affects),
        **{**extra, "aliases": tuple(extra["aliases"])},
    )


def _option_kind(kinds: list[Any], literals: list[Any]) -> OptionKind:
    if bool in kinds and literals:
        return "amount"
    if bool in kinds or any(isinstance(value, bool) for value in literals):
        return "flag"
    if literals:
        return "count" if any(_is_integer(kind) for kind in kinds) else "choice"
    return "integer" if int in kinds else "number" if float in kinds else "text"


def _is_integer(kind: Any) -> bool:
    """Return whether a type is int, with or without bounds."""
    return kind is int or (typing.get_origin(kind) is Annotated and typing.get_args(kind)[0] is int)


def _format_bounds(field: FieldInfo) -> str:
    """Return "at least 0, less than 1"."""
    rules = [
        item
        for rule in field.metadata
        if is_dataclass(rule)
        for item in asdict(cast(Any, rule)).items()
    ]
    return ", ".join(
        f"{BOUND_PHRASES[word]} {limit:.7g}" for word, limit in rules if word in BOUND_PHRASES
    )
