from __future__ import annotations

import json
import math
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.config.jsonc import parse_jsonc
from simpletuner.errors import ConfigError
from tests.quick import assert_quick

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
DECORATION = st.sampled_from(
    ["", " ", "\n", "\t", "// c, ]}\n", '# "x": 1\n', "/* , } */", "/**/\r\n"]
)
FRAGMENTS = st.lists(
    st.sampled_from(
        [
            '"a"',
            '"b\\n"',
            "1",
            "-0",
            "01",
            "1.",
            "1e5",
            "[",
            "]",
            "{",
            "}",
            ",",
            ":",
            "true",
            "null",
            "NaN",
            " ",
        ]
    ),
    max_size=10,
).map("".join)


@given(VALUES, st.sampled_from([None, 0, 3]), st.booleans())
def test_reads_what_json_reads(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert parse_jsonc(text, "x").value == json.loads(text)


def decorated(value: Any, draw: Any) -> str:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
        written = [
            draw(DECORATION)
            + ("" if key is None else json.dumps(key) + draw(DECORATION) + ":" + draw(DECORATION))
            + decorated(item, draw)
            + draw(DECORATION)
            for key, item in items
        ]
        comma = "," if written and draw(st.booleans()) else ""
        brackets = "{}" if isinstance(value, dict) else "[]"
        return brackets[0] + ",".join(written) + comma + draw(DECORATION) + brackets[1]
    return json.dumps(value)


@given(VALUES, st.data())
def test_comments_and_trailing_commas_change_nothing(value: Any, data: st.DataObject) -> None:
    text = data.draw(DECORATION) + decorated(value, data.draw) + data.draw(DECORATION)
    document = parse_jsonc(text, "x")
    assert document.value == value
    lines = text.split("\n")
    for path, (line, column) in document.positions.items():
        rest = lines[line - 1][column - 1 :]
        if path and isinstance(path[-1], str):
            assert rest.startswith(json.dumps(path[-1])), (path, rest)
        elif path:
            assert rest[0] in '[{"-0123456789tfn'


@settings(max_examples=200)
@given(FRAGMENTS | st.text(alphabet=string.printable, max_size=20))
def test_never_crashes_and_agrees_with_json(text: str) -> None:
    try:
        ours: Any = ("value", parse_jsonc(text, "x").value)
    except ConfigError:
        ours = None

    def refuse(word: str) -> None:
        raise ValueError(word)

    def finite(digits: str) -> float:
        if not math.isfinite(float(digits)):
            raise ValueError(digits)  # json itself makes infinity of 1e501
        return float(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        theirs: Any = json.loads(
            text, parse_constant=refuse, parse_float=finite, object_pairs_hook=unique
        )
        theirs = ("value", theirs)
    except ValueError:
        return  # comments and trailing commas are ours alone
    assert ours == theirs


def test_positions() -> None:
    text = '// top\n[\n  {"id": "a", # here\n   "sizes": [1,\n\t2]},\n  {},\n]'
    document = parse_jsonc(text, "m.json")
    assert document.value == [{"id": "a", "sizes": [1, 2]}, {}]
    assert document.positions == {
        (): (2, 1),
        (0,): (3, 3),
        (0, "id"): (3, 4),
        (0, "sizes"): (4, 4),
        (0, "sizes", 0): (4, 14),
        (0, "sizes", 1): (5, 2),
        (1,): (6, 3),
    }
    assert document.location_of((0, "sizes", 1)) == "m.json:5:2"
    assert document.location_of((1, "absent")) == "m.json:6:3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "a": 2}', "x:2:2: 'a' appears twice"),
        ('{"a" 1}', "x:1:6: Expecting ':' delimiter"),
        ('{"a": 1\n "b": 2}', "x:2:2: Expecting ',' delimiter"),
        ("{a: 1}", "x:1:2: Expecting property name enclosed in double quotes"),
        ("[NaN]", "x:1:2: a value is expected here, not NaN"),
        ("[-Infinity]", "x:1:2: a value is expected here, not -Infinity"),
        ("[1e999]", "x:1:2: 1e999 is too large"),
        ('{"a": True}', "write it in lower case"),
        ("['a']", "text needs double quotes"),
        ("[1", "x:1:3: Expecting ',' delimiter"),
        ("/* x", "x:1:1: this comment is never closed"),
        ("[1, /* a */ 2 /* b */ ] 3", "x:1:25: Extra data"),
        ("[] x", "x:1:4: Extra data"),
        ("[,]", "x:1:2: a value is expected here"),
        ("[01]", "x:1:3: Expecting ',' delimiter"),
        (
            '{"a": NaN, "a": Infinity}',
            "x:1:12: 'a' appears twice\nx:1:17: a value is expected here",
        ),
        ('["a\nb"]', "x:1:4: Invalid control character at"),
        ('["a', "x:1:2: Unterminated string starting at"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ("[" * 5000, "more than 100 levels"),
        ("9" * 5000, "too large"),
        ("9" * 5000 + "x", "a number with thousands of digits"),
        ("", "x:1:1: the file is empty"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_jsonc(text, "x")
    assert message in str(caught.value)


def test_all_duplicates_are_told_and_the_byte_order_mark_is_not_text() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_jsonc('\ufeff{"a": 1, "b": 1, "a": 1, "b": 1}', "x")
    assert [str(problem) for problem in caught.value.problems] == [
        "x:1:18: 'a' appears twice",
        "x:1:26: 'b' appears twice",
    ]


def test_three_thousand_keys_take_no_time() -> None:
    text = json.dumps({f"key_{number}": [number, "x"] for number in range(3000)}, indent=1)
    assert len(parse_jsonc(text, "x").value) == 3000
    assert_quick(lambda: parse_jsonc(text, "x"), 0.5)


@pytest.mark.parametrize("end", ["", "\\"])
def test_a_text_that_is_never_closed_is_read_once(end: str) -> None:
    def read() -> None:
        with pytest.raises(ConfigError, match="Unterminated string"):
            parse_jsonc('"' + '\\"' * 20_000 + end, "x")

    assert_quick(read, 1)
