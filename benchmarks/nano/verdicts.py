"""What a difference between two rows of a table says, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Student's t for 95 %, both sides, by the number of seeds: standard errors from which a difference
# is one.
T_CRITICAL = {2: 12.71, 3: 4.30}
PERHAPS_ERRORS = 2.0  # standard errors from which a difference is mentioned
# measure -> words for a lower and for a higher value than the first row's
WORDS = {
    "held_out": ("lower held-out loss", "higher held-out loss"),
    "zorbo_zorbo": ("less learnt", "more learnt"),
    "lost_all": ("less forgotten", "more forgotten"),
}
RULE_IN_WORDS = (
    "In words: a difference is clear where its 95 % interval excludes 0 (from 4.3 standard errors on with "
    "three seeds), and perhaps one from two standard errors on. Chance makes about one of twenty clear. "
    "Shares of images have at least the error of their rounding to whole images."
)


def measure_clearness(difference: Mapping[str, float | None] | None) -> float:
    """Return a difference in standard errors, with its sign; 0 where it or its error is missing."""
    if not difference or difference["se"] is None or not difference["mean"]:
        return 0.0
    error = difference["se"]
    return difference["mean"] / error if error else float("inf") * difference["mean"]


def is_clear(row: Mapping[str, Any], measure: str) -> bool:
    """Return whether a row differs from the first one at 95 %, with as many seeds as are finished."""
    away = abs(measure_clearness(row["against"].get(measure)))
    return away >= T_CRITICAL.get(row["finished"], float("inf"))


def verdict_in_words(row: Mapping[str, Any]) -> str:
    """Return what the differences from the first row say; nothing with a single seed.

    row: as result_tables.py makes it.
    """
    difference = row["against"].get("held_out")
    if not difference or difference["se"] is None:
        return ""
    words = []
    for measure, (lower, higher) in WORDS.items():
        away = measure_clearness(row["against"].get(measure))
        if abs(away) < PERHAPS_ERRORS:
            continue
        doubt = "" if is_clear(row, measure) else "perhaps "
        words.append(f"{doubt}{lower if away < 0 else higher}")
    return ", ".join(words) or "no difference"
