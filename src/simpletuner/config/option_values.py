"""Conversion of one written value to the value of its option."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from simpletuner.config.option import OptionSection
from simpletuner.config.option_catalog import Option, section_options
from simpletuner.errors import ConfigError

SectionT = TypeVar("SectionT", bound=OptionSection)
TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
NULL_WORDS = ("", "null", "none")
MAX_VALUE_CHARS = 60
OPTIONS_WITH_LINES = ("modelspec_comment",)  # texts that may be written as a list of lines
SIZE_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(G|M)(i?)B?)?", re.IGNORECASE)


class InvalidOptionValue(ValueError):
    """A value that does not fit its option; the text says what is allowed."""


def parse_value(option: Option, raw: Any) -> Any:
    """Return the value that `raw` means for `option`; None is "not given".

    Blank texts are "not given" where null is allowed. Bounds are left to the schema. Raises
    InvalidOptionValue.
    """
    if raw is None or (
        option.nullable and isinstance(raw, str) and raw.strip().lower() in NULL_WORDS
    ):
        return None
    value = PARSERS[option.kind](option, raw)
    return None if option.zero_is_null and value == 0 else value


def _parse_flag(option: Option, raw: Any) -> bool:
    word = str(raw).strip().lower() if isinstance(raw, (bool, str)) else ""
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise InvalidOptionValue("must be true or false")
    if option.choices and word in TRUE_WORDS:
        raise InvalidOptionValue(option.refused_values["true"])
    return word in TRUE_WORDS


def _parse_amount(option: Option, raw: Any) -> bool | int | str:
    """Parse true, false, a choice or a number; 1 and 0 mean true and false."""
    word = str(raw).strip().lower()
    if word in TRUE_WORDS + FALSE_WORDS or isinstance(raw, bool):
        return word in TRUE_WORDS
    if word in option.choices:
        return word
    try:
        return _parse_integer(option, raw)
    except InvalidOptionValue:
        raise InvalidOptionValue(f"must be {option.takes}") from None


def _parse_count(option: Option, raw: Any) -> int | str:
    """Parse a choice or a whole number."""
    word = str(raw).strip().lower()
    if word in option.choices:
        return word
    try:
        return _parse_integer(option, raw)
    except InvalidOptionValue:
        raise InvalidOptionValue(f"must be {option.takes}") from None


def _parse_integer(option: Option, raw: Any) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, str):
        with contextlib.suppress(ValueError):  # "1e3" and "500.0" are whole numbers too
            return int(raw)
    value = _parse_number(option, raw, "a whole number")
    if value != value // 1 or abs(value) > 2**53:
        raise InvalidOptionValue("must be a whole number")
    return int(value)


def _parse_number(option: Option, raw: Any, wanted: str = "a number") -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise InvalidOptionValue(f"must be {wanted}")
    try:
        return float(raw)
    except (ValueError, OverflowError):
        raise InvalidOptionValue(f"must be {wanted}") from None


def _parse_choice(option: Option, raw: Any) -> str:
    if isinstance(raw, int) and not isinstance(raw, bool):
        raw = str(raw)  # the version of something
    if not isinstance(raw, str):
        raise InvalidOptionValue(f"must be one of {', '.join(option.choices)}")
    word = raw.strip().lower()
    word = option.value_aliases.get(word, word)
    if word in option.choices:
        return word
    allowed = f"allowed: {', '.join(option.choices)}"
    if word in option.refused_values:
        raise InvalidOptionValue(f"{option.refused_values[word]}; {allowed}")
    raise InvalidOptionValue(allowed + did_you_mean(word, option.choices))


def _parse_text(option: Option, raw: Any) -> Any:
    if isinstance(raw, str):
        parsed = _parse_structure(raw) if option.structured else raw
        # A caption may be JSON itself, where an option takes a text or a list of texts.
        return raw if isinstance(parsed, dict) and not option.takes_objects else parsed
    if isinstance(raw, (int, float)) and not isinstance(raw, bool):
        return str(raw)
    if option.structured and isinstance(raw, (list, dict)):
        return raw
    if option.name in OPTIONS_WITH_LINES and isinstance(raw, list):
        return "\n".join(map(str, raw))
    raise InvalidOptionValue(
        "must be text" + (", a list or an object" if option.structured else "")
    )


def _parse_structure(raw: str) -> Any:
    """Parse a list or object written as text.

    A regular expression that starts with a bracket stays a text.
    """
    if raw.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(raw)
        except json.JSONDecodeError:
            return raw
    return raw


PARSERS: dict[str, Callable[[Option, Any], Any]] = {
    "flag": _parse_flag,
    "amount": _parse_amount,
    "count": _parse_count,
    "integer": _parse_integer,
    "number": _parse_number,
    "choice": _parse_choice,
    "text": _parse_text,
}


def validate_section(
    model: type[SectionT], given: Mapping[str, Any], report: Callable[[str, str], None]
) -> SectionT:
    """Build a section from parsed values.

    A value out of bounds is reported by name, and its option keeps the default.
    """
    try:
        return model(**given)
    except ValidationError as failure:
        table = section_options("", model)
        valid = dict(given)
        for error in failure.errors():
            name = str(error["loc"][0])
            if (value := valid.pop(name, None)) is not None:
                report(
                    name,
                    f"{format_assignment(table[name], value)}: "
                    f"{_validation_message(table[name], error)}",
                )
        return model(**valid)


def _validation_message(option: Option, error: ErrorDetails) -> str:
    """Return pydantic's message in the words of this program: "must be at least 1 (images)"."""
    if option.bounds and error["type"].startswith(("greater_than", "less_than")):
        return f"must be {option.bounds}" + (f" ({option.unit})" if option.unit else "")
    if error["type"] == "string_pattern_mismatch":
        return option.text
    if error["type"] == "string_too_short":
        return "must not be empty"
    if error["type"] == "dict_type":
        return 'must be an object such as {"single_transformer_blocks.*": 2}'
    message = error["msg"].replace("Input should", "must")
    if len(error["loc"]) > 1 and isinstance(error["input"], (int, float)):
        return f"{error['loc'][1]!r}: {error['input']}: {message}"
    return message


def format_assignment(option: Option, value: Any) -> str:
    """Return "name = value" for a message.

    Objects may hold secrets and are not repeated.
    """
    if isinstance(value, (list, dict)):
        return option.name
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else str(value)
    if len(text) > MAX_VALUE_CHARS:
        text = f"{text[:MAX_VALUE_CHARS]}..."
    return f"{option.name} = {text}"


def did_you_mean(word: str, names: Iterable[str], likeness: float = 0.7) -> str:
    """Return "; did you mean 'learning_rate'?", or an empty text."""
    close = difflib.get_close_matches(word.lower(), list(names), n=1, cutoff=likeness)
    return f"; did you mean '{close[0]}'?" if close else ""


def parse_memory_size(text: str) -> int:
    """Return "12GB", "11.5 GiB" or "12" (GB) in bytes."""
    match = SIZE_PATTERN.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--fit: {text!r} is not a size; use for example 12GB")
    number, letter, binary = float(match[1]), (match[2] or "G").upper(), bool(match[3])
    return int(number * (1024 if binary else 1000) ** {"M": 2, "G": 3}[letter])
