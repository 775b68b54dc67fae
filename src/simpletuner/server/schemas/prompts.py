"""Messages about prompt libraries."""

from __future__ import annotations

from simpletuner.server.schemas.base import ApiModel
from simpletuner.server.schemas.configs import PromptEntries, PromptEntry


class PromptLibrary(ApiModel):
    """A named list of prompts in the workspace."""

    name: str
    prompts: list[PromptEntry]
    changed_t: float


class PromptLibraryWrite(ApiModel):
    """The prompts of a library to create or replace."""

    prompts: PromptEntries
