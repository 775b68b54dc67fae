"""`--option value`, `--option=value`, `option=value` and bare `--flag`, as pairs; `-` and `_` alike."""

from __future__ import annotations

import re
from collections.abc import Sequence

from simpletuner.config.catalog import catalog
from simpletuner.config.values import FALSE, TRUE
from simpletuner.errors import ConfigError, Problem

ASSIGNED = re.compile(r"(?:--)?([A-Za-z][\w-]*)=(.*)", re.DOTALL)
ALONE = ("flag", "amount")
DASHED = re.compile(r"--([A-Za-z][\w-]*)")


def pairs(argv: Sequence[str], switches: Sequence[str] = ()) -> list[tuple[str, str | None]]:
    """(name, value) in the order typed, names with `_`; value None for a flag that stands alone.

    switches: names that never take the next word. A word that is none of the forms raises ConfigError.
    """
    found: list[tuple[str, str | None]] = []
    problems: list[Problem] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        assigned, dashed = ASSIGNED.fullmatch(word), DASHED.fullmatch(word)
        if assigned:
            found.append((assigned[1].replace("-", "_"), assigned[2]))
        elif dashed:
            name = dashed[1].replace("-", "_")
            found.append((name, words.pop(0) if words and _is_value(name, words[0], switches) else None))
        else:
            problems.append(
                Problem("", f"{word!r} belongs to no option; write --option value or option=value")
            )
    if problems:
        raise ConfigError(problems)
    return found


def _is_value(name: str, word: str, switches: Sequence[str]) -> bool:
    """A boolean takes the next word only if it says yes, no or how much; nothing takes one like `--seed`."""
    if name in switches or DASHED.fullmatch(word) or (word.startswith("--") and ASSIGNED.fullmatch(word)):
        return False
    option = catalog().get(name)
    if option is None or option.kind not in ALONE:
        return True
    return word.lower() in TRUE + FALSE or (
        option.kind == "amount" and (word.isdigit() or word in option.choices)
    )
