"""JSON with comments and trailing commas, and the line and column of every key and list element.

`//`, `#` and `/* */` comments and trailing commas are blanked at equal offsets; the standard
library reads the rest. Refused: duplicate keys, NaN and infinities, lone surrogates, more than 100
levels.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from simpletuner.errors import ConfigError, Problem

JsonPath = tuple[str | int, ...]

# Comments and strings end at the same place whatever follows, so one pass is enough.
COMMENT_PATTERN = r"//[^\n]*(?=\n|\Z)|#[^\n]*(?=\n|\Z)|/\*(?:(?!\*/).)*(?:\*/|\Z)"
TOKEN_PATTERN = re.compile(
    rf'"(?:[^"\\]|\\(?:.|\Z))*(?:"|\Z)|{COMMENT_PATTERN}|[\[\]{{}},:]|[^\[\]{{}},:"/#\s]+',
    re.DOTALL,
)
CLOSING_BRACKET_PATTERN = re.compile(rf"(?:\s|{COMMENT_PATTERN})*[\]}}]", re.DOTALL)
TOKENS_BEFORE_VALUE = ("", "[", "{", ",", ":")  # a comma behind one of these ends no value
WORD_PATTERN = re.compile(r"[\w$.+-]+")
NONFINITE_LITERALS = ("NaN", "Infinity", "-Infinity")
MAX_DEPTH = 100


@dataclass(frozen=True)
class Document:
    """A parsed text. value: the result of json.loads. positions: path -> (line, column), from 1.

    The path of a member points at its key, of a list element at its first character, () at the
    root.
    """

    value: Any
    positions: Mapping[JsonPath, tuple[int, int]]
    name: str = ""

    def location_of(self, path: JsonPath = ()) -> str:
        """Return the position of the nearest enclosing path that has one: "config.json:7:3"."""
        while path and path not in self.positions:
            path = path[:-1]
        position = self.positions.get(path)
        return f"{self.name}:{position[0]}:{position[1]}" if position else self.name


def parse_jsonc(text: str, name: str) -> Document:
    """Parse a whole text; `name` is how messages call the file.

    Raises ConfigError with every problem.
    """
    walk, value = _TokenScanner(text.removeprefix("\ufeff")), None
    try:
        value = json.loads(walk.to_plain_json())
    except json.JSONDecodeError as error:
        walk.add_problem(_describe_decode_error(error), error.pos)
    except ValueError:  # so many digits that Python makes no number of them
        if not walk.problems:  # nor did float, of what follows them at once
            walk.add_problem("a number with thousands of digits, and more behind it, is none", 0)
    if walk.problems:
        places = [(*walk.line_and_column(at), message) for at, message in sorted(walk.problems)]
        raise ConfigError(
            [Problem(f"{name}:{line}:{column}", message) for line, column, message in places]
        )
    return Document(value, walk.positions, name)


class _TokenScanner:
    """One pass over the tokens of a text that may be anything. problems: (offset, sentence)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.positions: dict[JsonPath, tuple[int, int]] = {}
        self.problems: list[tuple[int, str]] = []
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.path: list[str | int] = []  # of every open bracket the key or the index that is read
        self.keys_read: list[set[str]] = []  # of every open bracket those that were read
        self.expects_key = False

    def line_and_column(self, at: int) -> tuple[int, int]:
        """Return line and column, from 1."""
        line = bisect.bisect_right(self.line_starts, at)
        return line, at - self.line_starts[line - 1] + 1

    def add_problem(self, message: str, at: int) -> None:
        self.problems.append((at, message))

    def to_plain_json(self) -> str:
        """Return the text with blanks for comments and trailing commas."""
        pieces, begin, last = [], 0, ""
        for match in TOKEN_PATTERN.finditer(self.text):
            word, at = match[0], match.start()
            trailing = (
                word == ","
                and last not in TOKENS_BEFORE_VALUE
                and CLOSING_BRACKET_PATTERN.match(self.text, match.end())
            )
            if trailing or word.startswith(("//", "#", "/*")):
                pieces += [self.text[begin:at], re.sub(r"[^\n]", " ", word)]
                begin = match.end()
                if word.startswith("/*") and (len(word) < 4 or not word.endswith("*/")):
                    self.add_problem("this comment is never closed: '*/' is missing", at)
                continue
            self.scan_token(word, at)
            last = word
            if len(self.path) > MAX_DEPTH:  # json.loads recurses once per level
                self.add_problem(f"more than {MAX_DEPTH} levels", at)
                return "null"
        return "".join([*pieces, self.text[begin:]])

    def scan_token(self, word: str, at: int) -> None:
        if word in "]}":
            self.path[-1:], self.keys_read[-1:], self.expects_key = [], [], False
        elif word == "," and self.path:
            index = self.path[-1]
            self.expects_key = isinstance(index, str)
            self.path[-1] = index + 1 if isinstance(index, int) else index
        elif self.expects_key and word[0] == '"':
            key = self.path[-1] = self.parse_string(word, at)
            self.expects_key = False
            if key in self.keys_read[-1]:
                self.add_problem(f"{key!r} appears twice", at)
            self.keys_read[-1].add(key)
            self.positions[tuple(self.path)] = self.line_and_column(at)
        elif word not in ",:":
            self.scan_value(word, at)

    def scan_value(self, word: str, at: int) -> None:
        if not self.path or isinstance(self.path[-1], int):
            self.positions.setdefault(tuple(self.path), self.line_and_column(at))
        if word in "[{":
            self.path.append(0 if word == "[" else "")
            self.keys_read.append(set())
            self.expects_key = word == "{"
        elif word[0] == '"':
            self.parse_string(word, at)
        elif word in NONFINITE_LITERALS:
            self.add_problem(f"a value is expected here, not {word}", at)
        else:
            with suppress(ValueError):  # a literal, or a number that float() refuses
                if math.isinf(float(word)):
                    self.add_problem(f"{word[:40]} is too large", at)

    def parse_string(self, word: str, at: int) -> str:
        with suppress(
            json.JSONDecodeError
        ):  # reported with its position when the whole text is parsed
            text: str = json.loads(word)
            if any("\ud800" <= character <= "\udfff" for character in text):
                self.add_problem("half of a surrogate pair is not a character", at)
            return text
        return word


def _describe_decode_error(error: json.JSONDecodeError) -> str:
    if not error.doc.strip():
        return "the file is empty"
    if error.msg != "Expecting value":
        return error.msg
    match = WORD_PATTERN.match(error.doc, error.pos)
    word = match[0] if match else error.doc[error.pos : error.pos + 1] or "the end of the file"
    hint = "; write it in lower case" if word.lower() in ("true", "false", "null") else ""
    return f"a value is expected here, not {word}{hint}; text needs double quotes"
