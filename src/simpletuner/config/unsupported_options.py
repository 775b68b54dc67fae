"""Options of SimpleTuner that do not exist here, by name, with a reason or a replacement.

They are listed in unsupported_options.toml, one row per option.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Requested by name and always on; the notice says so.
ALWAYS_ON_OPTIONS: Mapping[str, str] = {
    "fuse_optimizer": "always on where torch can: AdamW is one pass without a temporary copy",
    "offload_during_startup": "always on: text encoder, VAE and transformer are loaded in turn",
}
OFF_VALUES = ("", "0", "0.0", "false", "no", "no_change", "none", "null", "[]", "{}")


@dataclass(frozen=True)
class UnsupportedOption:
    """A row of the table.

    name: may contain *. skipped_values: values that change nothing; "*" is any, "+" is any with a
    notice.
    """

    name: str
    skipped_values: tuple[str, ...]
    reason: str


@functools.cache
def unsupported_options() -> tuple[UnsupportedOption, ...]:
    """Return the rows in the order of the file."""
    file = resources.files("simpletuner.config").joinpath("unsupported_options.toml")
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    return tuple(
        UnsupportedOption(name, tuple(values), reason)
        for reason, rows in tables.items()
        for name, values in rows.items()
    )


def _find_row(name: str) -> UnsupportedOption | None:
    matching = (row for row in unsupported_options() if fnmatch.fnmatchcase(name, row.name))
    return next(matching, None)


def always_on_reason(name: str) -> str | None:
    """Return "always on: ..." for an option that asks for what is always done, else None."""
    return ALWAYS_ON_OPTIONS.get(name)


def unsupported_reason(name: str) -> str | None:
    """Return why this option of SimpleTuner is not supported ("use adam_beta1").

    None for any other name.
    """
    row = _find_row(name)
    return None if row is None else row.reason


def is_harmless_value(name: str, value: object) -> bool:
    """Return whether an unsupported option is off, or at a value that changes nothing.

    Saved forms hold hundreds of such values.
    """
    row = _find_row(name)
    skipped = () if row is None else row.skipped_values
    text = f"{value:g}" if isinstance(value, float) else str(value).strip().lower()
    return text in OFF_VALUES or text in skipped or "*" in skipped


def is_noted(name: str) -> bool:
    """Return whether any value of an unsupported option is skipped with a notice of the reason."""
    row = _find_row(name)
    return row is not None and "+" in row.skipped_values


def unsupported_names_by_reason() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return (reason, names) as the documentation shows them."""
    names: dict[str, list[str]] = {}
    for row in unsupported_options():
        names.setdefault(row.reason, []).append(row.name)
    return tuple((reason, tuple(members)) for reason, members in names.items())
