"""JSON with comments and trailing commas, and the line and column of every key and list element.

`//`, `#` and `/* */` comments, trailing commas. Refused: duplicate keys, NaN and infinities, lone
surrogates, more than 100 levels.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # the C one, with end offsets
from typing import Any

from simpletuner.errors import ConfigError, Problem

Path = tuple[str | int, ...]

BLANK = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.DOTALL)
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?(?![\w.])", re.ASCII)
WORD = re.compile(r"[\w$.+-]+")
CONSTANTS: Mapping[str, bool | None] = {"true": True, "false": False, "null": None}
DEEPEST = 100
LONGEST_INTEGER = 300  # digits that a float can hold too


@dataclass(frozen=True)
class Document:
    """value: what json.loads would give. positions: path of keys and indexes -> (line, column), from 1.

    The path of a member points at its key, of a list element at its first character, () at the root.
    """

    value: Any
    positions: Mapping[Path, tuple[int, int]]
    name: str = ""

    def where(self, path: Path = ()) -> str:
        """Of the nearest enclosing path that has a position: "config.json:7:3"."""
        while path and path not in self.positions:
            path = path[:-1]
        position = self.positions.get(path)
        return f"{self.name}:{position[0]}:{position[1]}" if position else self.name


def parse(text: str, name: str) -> Document:
    """Read a whole text; `name` is how the file is called in messages. Raises ConfigError."""
    reader = _Reader(text.removeprefix("\ufeff"), name)
    value = reader.document()
    if reader.problems:
        raise ConfigError(reader.problems)
    return Document(value, reader.positions, name)


class _Reader:
    """Recursive descent over one text; `at` is the offset of the next character."""

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name
        self.at = 0
        self.positions: dict[Path, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def document(self) -> Any:
        self.blank()
        if self.at >= len(self.text):
            raise self.error("the file is empty")
        self.positions[()] = self.position(self.at)
        value = self.value(())
        self.blank()
        if self.at < len(self.text):
            raise self.error("the file should end here")
        return value

    def position(self, at: int) -> tuple[int, int]:
        line = bisect.bisect_right(self.line_starts, at)
        return line, at - self.line_starts[line - 1] + 1

    def problem(self, what: str, at: int) -> Problem:
        line, column = self.position(at)
        return Problem(f"{self.name}:{line}:{column}", what)

    def error(self, what: str, at: int | None = None) -> ConfigError:
        return ConfigError([self.problem(what, self.at if at is None else at)])

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def blank(self) -> None:
        match = BLANK.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        if self.text.startswith("/*", self.at):
            raise self.error("this comment is never closed: '*/' is missing")

    def value(self, path: Path) -> Any:
        if len(path) > DEEPEST:
            raise self.error(f"more than {DEEPEST} levels")
        first = self.peek()
        if first == "{":
            return self.members(path)
        if first == "[":
            return self.elements(path)
        if first == '"':
            return self.string()
        if first == "-" or first.isdecimal():
            return self.number()
        return self.constant()

    def members(self, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.at += 1
        while not self.closed("}", first=not found):
            start = self.at
            if self.peek() != '"':
                raise self.error('a key in double quotes, such as "seed", is expected here')
            key = self.string()
            if key in found:
                self.problems.append(self.problem(f"{key!r} appears twice", start))
            inside = (*path, key)
            self.positions[inside] = self.position(start)
            self.blank()
            if self.peek() != ":":
                raise self.error(f"':' is expected after the key {key!r}")
            self.at += 1
            self.blank()
            found[key] = self.value(inside)
        return found

    def elements(self, path: Path) -> list[Any]:
        found: list[Any] = []
        self.at += 1
        while not self.closed("]", first=not found):
            inside = (*path, len(found))
            self.positions[inside] = self.position(self.at)
            found.append(self.value(inside))
        return found

    def closed(self, bracket: str, first: bool) -> bool:
        """Step over the comma before the next item, or over the closing bracket (then True)."""
        self.blank()
        if not first and self.peek() == ",":
            self.at += 1
            self.blank()
        elif not first and self.peek() != bracket:
            end = "the end of the file" if self.at >= len(self.text) else f"{self.peek()!r}"
            raise self.error(f"',' or {bracket!r} is expected before {end}")
        if self.peek() == bracket:
            self.at += 1
            return True
        if self.at >= len(self.text):
            raise self.error(f"the file ends before its {bracket!r}")
        return False

    def string(self) -> str:
        start = self.at
        try:
            value, self.at = scanstring(self.text, start + 1, True)
        except json.JSONDecodeError as error:
            raise self.error(f"in this text: {error.msg}", min(error.pos, len(self.text))) from None
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error("half of a surrogate pair is not a character", start)
        return value

    def number(self) -> int | float:
        match = NUMBER.match(self.text, self.at)
        if match is None:
            raise self.error(f"{self.word()!r} is not a number as JSON writes it")
        if match[1] is None and match[2] is None and len(match[0]) <= LONGEST_INTEGER:
            self.at = match.end()
            return int(match[0])
        value = float(match[0])
        if not math.isfinite(value):
            raise self.error(f"{match[0][:40]} is too large")
        self.at = match.end()
        return value

    def constant(self) -> bool | None:
        word = self.word()
        if word not in CONSTANTS:
            hint = "; write it in lower case" if word.lower() in CONSTANTS else ""
            shown = word or self.peek() or "the end of the file"
            raise self.error(f"a value is expected here, not {shown}{hint}; text needs double quotes")
        self.at += len(word)
        return CONSTANTS[word]

    def word(self) -> str:
        match = WORD.match(self.text, self.at)
        return match[0] if match else ""
