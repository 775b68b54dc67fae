"""The declaration of an option: the annotation gives its type, `option(...)` all else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

OptionLevel = Literal["basic", "common", "advanced"]
ResumePolicy = Literal["fixed", "free"]
PathKind = Literal["", "file", "hub", "new"]
# "step": what one training step computes and allocates, as the memory planner measures it.
# "plan": any other figure of a plan (memory of the device and the host, disk space, time).
Effect = Literal["step", "plan"]
ValueReader = Callable[[str], Any]
_UNSET: Any = object()


@dataclass(frozen=True)
class Not:
    """Every value except this one, as a condition in `needs`."""

    value: Any


@dataclass(frozen=True)
class Need:
    """One condition: `option` has one of `values`, or none of them where `negated`."""

    option: str
    values: tuple[Any, ...]
    negated: bool = False

    def holds(self, value: Any) -> bool:
        """Return whether `value` fulfils the condition. True and 1 are different values."""
        is_listed = any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
            for allowed in self.values
        )
        return is_listed != self.negated

    def to_json(self) -> list[Any]:
        """Return the allowed values; {"not": value} stands for every value except that one."""
        return [{"not": value} if self.negated else value for value in self.values]

    def __str__(self) -> str:
        if self.negated and self.values == (None,):
            return f"a value for {self.option}"
        shown = join_words([format_value(value) for value in self.values], "or")
        return f"{self.option} {'other than ' if self.negated else ''}{shown}"


NeedGroup = tuple[Need, ...]  # fulfilled when at least one of its conditions holds
OptionNeeds = tuple[NeedGroup, ...]  # fulfilled when every group is


class OptionSection(BaseModel):
    """A group of options. Frozen; unknown names are refused.

    shared_needs, shared_affects: `needs` and `affects` of every option that declares none of its
    own.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        validate_default=True,
    )
    shared_needs: ClassVar[Mapping[str, Any]] = {}
    shared_affects: ClassVar[frozenset[Effect]] = frozenset({"step", "plan"})


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
    needs: Mapping[str, Any] | None = None,
    needs_any: Mapping[str, Any] | None = None,
    unmet_errors: Mapping[str, str] | None = None,
    idle_value: Any = _UNSET,
    affects: set[Effect] | None = None,
    **bounds: Any,
) -> Any:
    """Declare one option.

    text: one sentence of help. resume_policy: "free" if it may change between a checkpoint and its
    resumption. path: "file" must exist, "hub" may also be a repository id; both are looked for in
    the folder of the config file first. "new" need not exist, only ~ is expanded. aliases,
    value_aliases: other names and values, read with a notice. refused_values: values refused with a
    reason of their own. zero_is_null: 0 means "not given". bounds: gt, ge, lt, le, pattern.

    needs: option -> the value, the tuple of values or the `Not(value)` that it must have for this
    one to have an effect; all must hold. needs_any: the same, one must hold. The form hides the
    option otherwise, and the reader warns about a value that is neither the default nor
    `idle_value`; where `unmet_errors` has a sentence for the option that is not as needed, it
    refuses the value. affects: what of a plan depends on the option; the section's `shared_affects`
    unless given.
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
        "needs": needs,
        "needs_any": needs_any,
        "unmet_errors": dict(unmet_errors or {}),
        "idle_value": default if idle_value is _UNSET else idle_value,
        "affects": None if affects is None else sorted(affects),
    }
    return Field(default, description=text, json_schema_extra=extra, **bounds)


def parse_needs(all_of: Mapping[str, Any], any_of: Mapping[str, Any]) -> OptionNeeds:
    """Return the declared conditions as groups.

    Each of `all_of` is a group of its own, `any_of` is one group.
    """
    groups: list[NeedGroup] = [(_parse_need(name, value),) for name, value in all_of.items()]
    if any_of:
        groups.append(tuple(_parse_need(name, value) for name, value in any_of.items()))
    return tuple(groups)


def _parse_need(name: str, value: Any) -> Need:
    if isinstance(value, Not):
        return Need(name, (value.value,), negated=True)
    return Need(name, value if isinstance(value, tuple) else (value,))


def find_unmet_need(needs: OptionNeeds, read: ValueReader) -> NeedGroup | None:
    """Return the first group of conditions that is not fulfilled. read: the value of an option."""
    for group in needs:
        if not any(need.holds(read(need.option)) for need in group):
            return group
    return None


def describe_needs(group: NeedGroup) -> str:
    """Return "loss_type huber or smooth_l1", or several conditions joined by "or"."""
    return ", or ".join(map(str, group))


def join_words(words: list[str], conjunction: str) -> str:
    """Return "a, b or c"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def format_value(value: Any) -> str:
    """Return the value as a person writes it: true, null, 0.5, cosine."""
    return value if isinstance(value, str) else json.dumps(value)
