"""What the server and its clients say to each other: the root, errors, states.

The OpenAPI document and the page's types come from this package. Sizes are bytes, times unix seconds,
durations seconds. Paths of files inside a run or dataset use "/".
"""

from __future__ import annotations

from typing import Literal

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
    """Root of all messages; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ErrorDetail(ApiModel):
    """loc: the option ("learning_rate"), dataset field ("photos.resolution") or "" for the whole."""

    loc: str
    message: str
    where: str = ""


class ErrorResponse(ApiModel):
    """Body of every answer that is no success."""

    detail: list[ErrorDetail]
