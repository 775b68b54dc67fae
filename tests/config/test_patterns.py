"""Regular expressions of users end in time and match as the standard library's do."""

from __future__ import annotations

import re

import pytest

from simpletuner.config import patterns
from simpletuner.config.patterns import full_matches, pattern_problem

NAMES = [
    f"{kind}.{number}.{module}"
    for kind in ("transformer_blocks", "single_transformer_blocks")
    for number in (0, 1, 10)
    for module in ("attn.to_q", "attn.to_out.0", "ff.net.0.proj", "proj_mlp")
]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*to_q",
        r"transformer_blocks\.\d+\.attn\..*",
        r"(?i)SINGLE.*\.proj_mlp",
        r"(?:single_)?transformer_blocks\.(0|1)\..*(?<!mlp)",
        r"[a-z_]+\.10\.(ff|attn).*",
        r"no such",
    ],
)
def test_the_same_names_as_by_the_standard_library(pattern: str) -> None:
    assert full_matches(pattern, NAMES) == [name for name in NAMES if re.fullmatch(pattern, name)]


@pytest.mark.parametrize("pattern", [r"(a|aa)+b", r"(a|a)*$"])
def test_a_catastrophic_pattern_ends_with_a_message(
    monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr(patterns, "TIMEOUT_S", 0.1)
    with pytest.raises(ValueError, match="nested repetitions"):
        full_matches(pattern, ["a" * 60 + "c"])


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "[", "(?P<x>a)(?P<x>b", "*a", "a" * 3000, "\\"])
def test_what_is_no_pattern_is_said(pattern: str) -> None:
    assert pattern_problem(pattern)
    with pytest.raises(ValueError):
        full_matches(pattern, NAMES)
