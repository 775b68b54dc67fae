"""Regular expressions that a user writes, run with a time limit.

The matcher of the standard library cannot be stopped: (a+)+b takes 2^n steps. The `regex` package
reads the same syntax and has a timeout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

MAX_PATTERN_CHARACTERS = 2000
TIMEOUT_S = 5.0
Value = TypeVar("Value")


def pattern_problem(pattern: str) -> str:
    """Describe why the text is not a usable regular expression; "" when it is one."""
    import regex  # here, as it costs a process 2 MB, and few configurations have a pattern

    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return f"has {len(pattern)} characters; the limit is {MAX_PATTERN_CHARACTERS}"
    try:
        regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
        return f"is not a regular expression: {error}"
    return ""


def full_matches(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that the whole pattern matches, in order.

    Raises ValueError when the pattern is not valid or one name takes longer than TIMEOUT_S.
    """
    if problem := pattern_problem(pattern):
        raise ValueError(problem)
    import regex

    compiled = regex.compile(pattern)
    try:
        return [name for name in names if compiled.fullmatch(name, timeout=TIMEOUT_S)]
    except TimeoutError:
        raise ValueError(
            f"needs more than {TIMEOUT_S:g} s for one name; avoid nested repetitions such as (a+)+"
        ) from None


def match_patterns(
    values: Mapping[str, Value], names: Sequence[str]
) -> tuple[dict[str, Value], list[str]]:
    """Return name -> value of the first pattern that matches it, and patterns that match none.

    Raises ValueError like `full_matches`.
    """
    values_by_name: dict[str, Value] = {}
    unused = []
    for pattern, value in values.items():
        matches = full_matches(pattern, names)
        if not matches:
            unused.append(pattern)
        for name in matches:
            values_by_name.setdefault(name, value)
    return values_by_name, unused
