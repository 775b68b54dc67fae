"""Parser of --option value, --option=value, option=value and flags without a value.

Hyphens and underscores in names mean the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from simpletuner.config.option_catalog import all_options
from simpletuner.config.option_values import FALSE_WORDS, TRUE_WORDS
from simpletuner.errors import ConfigError, Problem

ASSIGNMENT_PATTERN = re.compile(r"(?:--)?([A-Za-z][\w-]*)=(.*)", re.DOTALL)
KINDS_WITH_OPTIONAL_VALUE = ("flag", "amount")
FLAG_PATTERN = re.compile(r"--([A-Za-z][\w-]*)")


def parse_flags(
    argv: Sequence[str], switches: Sequence[str] = (), arguments: list[str] | None = None
) -> list[tuple[str, str | None]]:
    """Return (name, value) in the order typed, names with underscores; a flag alone has None.

    switches: names that never take the next argument. arguments: receives what is in none of these
    forms; without it such an argument raises ConfigError.
    """
    pairs: list[tuple[str, str | None]] = []
    problems: list[Problem] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        assigned, dashed = ASSIGNMENT_PATTERN.fullmatch(word), FLAG_PATTERN.fullmatch(word)
        if assigned:
            pairs.append((assigned[1].replace("-", "_"), assigned[2]))
        elif dashed:
            name = dashed[1].replace("-", "_")
            pairs.append(
                (
                    name,
                    words.pop(0) if words and _takes_next_word(name, words[0], switches) else None,
                )
            )
        elif arguments is not None and not word.startswith("-"):
            arguments.append(word)
        else:
            problems.append(
                Problem(
                    "",
                    f"{word!r} is not the value of an option; write --option value or option=value",
                )
            )
    if problems:
        raise ConfigError(problems)
    return pairs


def _takes_next_word(name: str, word: str, switches: Sequence[str]) -> bool:
    """Return whether the next argument is the value of this option.

    A boolean takes it only if it is a value of a boolean; an argument like --seed is never a value.
    """
    if (
        name in switches
        or FLAG_PATTERN.fullmatch(word)
        or (word.startswith("--") and ASSIGNMENT_PATTERN.fullmatch(word))
    ):
        return False
    option = all_options().get(name)
    if option is None or option.kind not in KINDS_WITH_OPTIONAL_VALUE:
        return True
    return word.lower() in TRUE_WORDS + FALSE_WORDS or (
        option.kind == "amount" and (word.isdigit() or word in option.choices)
    )
