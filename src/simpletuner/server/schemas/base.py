"""The base class of all API messages, errors, and the states of a job.

The OpenAPI document and the TypeScript types of the pages are generated from this package. Sizes
are in bytes, times in unix seconds, durations in seconds. Paths of files inside a run or dataset
use "/".
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer, model_validator

from simpletuner.server.translation import to_language_of_request

JobState = Literal[
    "draft",
    "queued",
    "starting",
    "caching",
    "running",
    "stopping",
    "stopped",
    "failed",
    "done",
    "lost",
]


# A sentence of this program for a person: a response has it in the language of its request.
Message = Annotated[str, PlainSerializer(to_language_of_request, return_type=str)]

# Cc, Cs, and of Cf those that change the direction or hide text. Joiners of scripts and emoji stay.
UNSHOWN_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    r"\ud800-\udfff]"
)


def escape_control_characters(text: str) -> str:
    """Return the text with escapes for characters that are not shown, except tab and line break."""
    return UNSHOWN_CHARACTERS.sub(lambda match: ascii(match[0])[1:-1], text)


class ApiModel(BaseModel):
    """Base class of all messages. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_half_surrogates(cls, data: Any) -> Any:
        """Refuse half of a surrogate pair, which JSON can hold and UTF-8 cannot.

        It can be written neither to a file nor to a response. UnicodeEncodeError is a ValueError.
        """
        if isinstance(data, dict):
            for name, value in data.items():
                for text in (name, value):
                    if isinstance(text, str):
                        text.encode("utf-8")
        return data


class ErrorDetail(ApiModel):
    """One problem with a request.

    loc: the option ("learning_rate") or dataset field ("photos.resolution") it concerns, "" for the
    whole request. where: the file and line, if the value was read from a file. suggestion: a value
    that the option can have instead, "" for none.
    """

    loc: str
    message: Message
    where: str = ""
    suggestion: str = ""

    @model_validator(mode="before")
    @classmethod
    def _refuse_half_surrogates(cls, data: Any) -> Any:
        """Escape what a request may hold and a message quote, instead of refusing it."""
        if isinstance(data, dict):
            return {
                name: escape_control_characters(text) if isinstance(text, str) else text
                for name, text in data.items()
            }
        return data


class ErrorResponse(ApiModel):
    """Body of every error response."""

    detail: list[ErrorDetail]


# The description is stated because the standard library's phrase for 422 changed in Python 3.13.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    422: {"description": "Unprocessable Content", "model": ErrorResponse}
}
