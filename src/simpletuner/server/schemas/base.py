"""The base class of all API messages, errors, and the states of a job.

The OpenAPI document and the TypeScript types of the pages are generated from this package. Sizes
are in bytes, times in unix seconds, durations in seconds. Paths of files inside a run or dataset
use "/".
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

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


class ApiModel(BaseModel):
    """Base class of all messages. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ErrorDetail(ApiModel):
    """One problem with a request.

    loc: the option ("learning_rate") or dataset field ("photos.resolution") it concerns, "" for the
    whole request. where: the file and line, if the value was read from a file.
    """

    loc: str
    message: str
    where: str = ""


class ErrorResponse(ApiModel):
    """Body of every error response."""

    detail: list[ErrorDetail]


# The description is stated because the standard library's phrase for 422 changed in Python 3.13.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    422: {"description": "Unprocessable Content", "model": ErrorResponse}
}
