"""Configuration files: JSON with comments, TOML or KEY=value, as a document with positions."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from simpletuner.bounded_files import read_bounded_text
from simpletuner.config import jsonc
from simpletuner.config.env_file import parse_env_file
from simpletuner.config.jsonc import Document
from simpletuner.errors import ConfigError, Problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_TOML_KIB = 256
MAX_TOML_DEPTH = 32
# Strings and comments of TOML, so that only keys and brackets remain.
TOML_TEXT_PATTERN = re.compile(
    r"""\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*""", re.DOTALL
)
TOML_DOTTED_PATTERN = re.compile(r"(?<![\w-])[\w-]+(?:[ \t]*\.[ \t]*[\w-]+)+")
TOML_KEY_PATTERN = re.compile(r"^[ \t]*([\"']?)([\w-]+)\1[ \t]*=", re.MULTILINE)
TOML_POSITION_PATTERN = re.compile(r" \(at line (\d+), column (\d+)\)$")


def read_document(path: Path, name: str) -> Document:
    """Read a .json, .jsonc, .toml or .env file.

    name: how messages call the file. Raises ConfigError.
    """
    try:
        text = read_bounded_text(path).removeprefix("\ufeff")
    except OSError as error:
        raise ConfigError([Problem(name, f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(name, f"is not UTF-8 text (byte {error.start})")]) from None
    return parse_document(text, path.suffix, name)


def parse_document(text: str, suffix: str, name: str) -> Document:
    """Parse a text that was read already: TOML or .env by its suffix, else JSON with comments.

    Raises ConfigError.
    """
    if suffix.lower() == ".env":
        return parse_env_file(text, name)
    return _parse_toml(text, name) if suffix.lower() == ".toml" else jsonc.parse_jsonc(text, name)


def _toml_excess(text: str) -> str:
    """Describe what is too large to be parsed in time; "" for a usual text.

    The library needs time quadratic in the parts of a dotted key, and recurses once per bracket.
    """
    if len(text) > MAX_TOML_KIB << 10:
        return f"{len(text) >> 10} KiB is too large for a TOML file; the limit is {MAX_TOML_KIB}"
    plain = TOML_TEXT_PATTERN.sub(lambda match: "" if match[0].startswith("#") else "s", text)
    parts = max((match[0].count(".") for match in TOML_DOTTED_PATTERN.finditer(plain)), default=0)
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", plain):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    if max(parts, deepest) > MAX_TOML_DEPTH:
        return f"more than {MAX_TOML_DEPTH} levels"
    return ""


def _parse_toml(text: str, name: str) -> Document:
    if problem := _toml_excess(text):
        raise ConfigError([Problem(name, problem)])
    try:
        value = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        place = TOML_POSITION_PATTERN.search(str(error))
        where = f"{name}:{place[1]}:{place[2]}" if place else name
        raise ConfigError([Problem(where, TOML_POSITION_PATTERN.sub("", str(error)))]) from None
    positions: dict[jsonc.JsonPath, tuple[int, int]] = {(): (1, 1)}
    for match in TOML_KEY_PATTERN.finditer(text):
        line_start = text.rfind("\n", 0, match.start(2)) + 1
        column = match.start(2) - len(match[1]) - line_start + 1
        positions.setdefault((match[2],), (text.count("\n", 0, match.start(2)) + 1, column))
    return Document(value, positions, name)
