"""Configuration files: JSON with comments, or TOML, read into a document with positions."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from simpletuner.config import jsonc
from simpletuner.config.jsonc import Document
from simpletuner.errors import ConfigError, Problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_FILE_MIB = 64
TOML_KEY_PATTERN = re.compile(r"^[ \t]*([\"']?)([\w-]+)\1[ \t]*=", re.MULTILINE)
TOML_POSITION_PATTERN = re.compile(r" \(at line (\d+), column (\d+)\)$")


def read_document(path: Path, name: str) -> Document:
    """Read a .json, .jsonc or .toml file.

    name: how messages call the file. Raises ConfigError.
    """
    try:
        size_mib = path.stat().st_size / 2**20
        if size_mib > MAX_FILE_MIB:  # weights named by mistake would fill the memory first
            raise ConfigError(
                [Problem(name, f"{size_mib:.0f} MiB is too large for a configuration file")]
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError([Problem(name, f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(name, f"is not UTF-8 text (byte {error.start})")]) from None
    return parse_document(text, path.suffix, name)


def parse_document(text: str, suffix: str, name: str) -> Document:
    """Parse a text that was read already: TOML by its suffix, else JSON with comments.

    Raises ConfigError.
    """
    return _parse_toml(text, name) if suffix.lower() == ".toml" else jsonc.parse_jsonc(text, name)


def _parse_toml(text: str, name: str) -> Document:
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
