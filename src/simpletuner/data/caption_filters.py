"""Filters that remove or replace parts of captions (caption_filter_list)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from simpletuner.errors import ConfigError

MAX_FILTER_FILE_BYTES = 1 << 20
SED_PATTERN = re.compile(r"s/((?:[^/\\]|\\.)+)/((?:[^/\\]|\\.)*)/?")


def read_filters(value: str | Sequence[str], resolve: Callable[[str], Path]) -> tuple[str, ...]:
    """Return the filters of a list, or of a .txt (one per line) or .json file (a list of texts).

    resolve: from the written path to the file. Raises ConfigError for a file that cannot be read
    and for a filter that is not a regular expression.
    """
    filters = _read_filter_file(resolve(value)) if isinstance(value, str) else list(value)
    for text in filters:
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{json.dumps(text)} is not a filter: each is a text that is removed")
        match = SED_PATTERN.fullmatch(text)
        if match is None:
            continue
        try:
            re.sub(match[1], _unescape(match[2]), "")
        except re.error as error:
            raise ConfigError(f"{json.dumps(text)} is not a regular expression: {error}") from error
    return tuple(filters)


def _read_filter_file(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILTER_FILE_BYTES + 1)
        if len(text) > MAX_FILTER_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILTER_FILE_BYTES >> 20} MiB")
        if path.suffix.lower() != ".json":
            return [line for line in text.decode("utf-8-sig").splitlines() if line.strip()]
        filters = json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not UTF-8 text or JSON: {error}") from error
    if not isinstance(filters, list):
        raise ConfigError(f"{path} must hold a list of texts")
    return filters


def apply_filters(caption: str, filters: Sequence[str]) -> str:
    """Return the caption after all filters, in their order.

    "s/pattern/replacement/" replaces the matches of a regular expression. Any other filter is
    removed where it stands literally in the caption; where it does not, it is read as a regular
    expression, and its matches are removed. Where something was removed, so are the commas and the
    spaces that it leaves behind.
    """
    filtered = caption
    for text in filters:
        filtered = _apply_filter(filtered, text)
    return filtered if filtered == caption else _remove_empty_tags(filtered)


def _apply_filter(caption: str, text: str) -> str:
    match = SED_PATTERN.fullmatch(text)
    if match is not None:
        return re.sub(match[1], _unescape(match[2]), caption)
    if text in caption:
        return caption.replace(text, "")
    try:
        return re.sub(text, "", caption)
    except re.error:
        return caption  # a plain text such as "C++" that this caption does not have


def _unescape(replacement: str) -> str:
    return replacement.replace("\\/", "/")


def _remove_empty_tags(caption: str) -> str:
    without_gaps = re.sub(r"\s*,(?:\s*,)+", ",", re.sub(r"[^\S\n]{2,}", " ", caption))
    return re.sub(r"\s+,", ",", without_gaps).strip(" ,\t\n")
