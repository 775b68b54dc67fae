"""Messages about captions: edits of many at once, their tags, and captions by a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simpletuner.server.schemas.base import ApiModel
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.schemas.library import TrashEntry


class CaptionEditRequest(ApiModel):
    """One change of all captions of a dataset.

    action "replace": replace `find` by `text`, "prefix" and "suffix": put `text` before or after
    each caption that does not have it there yet, "remove_tag": drop a part between commas. files:
    only these images, None for all. preview: change nothing, return examples.
    """

    action: Literal["replace", "prefix", "suffix", "remove_tag"]
    find: str = Field(default="", max_length=2000)
    text: str = Field(default="", max_length=2000)
    files: list[str] | None = None
    preview: bool = True


class CaptionChange(ApiModel):
    """The text of one caption file before and after a change."""

    file: str
    before: str
    after: str


class CaptionEditResult(ApiModel):
    """The result of a change of captions.

    count: captions that change. examples: some of them. trash: the old files, to undo the change;
    None for a preview.
    """

    count: int
    examples: list[CaptionChange]
    trash: TrashEntry | None = None


class TagCount(ApiModel):
    """A part of captions between commas, and the number of images that have it."""

    tag: str
    count: int


class CaptionOverview(ApiModel):
    """Captions of a dataset: their tags, the most frequent first, and their lengths in words."""

    tags: list[TagCount]
    captions: int
    shortest_words: int
    median_words: float
    longest_words: int


class CaptioningModelInfo(ApiModel):
    """A model for captions. fits: whether its memory is there; None if that is not known."""

    id: str
    memory_gb: float
    fits: bool | None


class CaptioningInfo(ApiModel):
    """The models that are offered, and the captioning jobs, the newest first."""

    models: list[CaptioningModelInfo]
    suggested: str
    prompt: str
    jobs: list[Job]


class CaptioningRequest(ApiModel):
    """A request to caption a dataset with a model.

    model: a repository, or a folder in the workspace. overwrite: replace captions that exist.
    files: only these images, None for all.
    """

    dataset: str
    model: str = Field(pattern=r"^[A-Za-z0-9_.][A-Za-z0-9_./-]{0,199}$")
    prompt: str = Field(min_length=1, max_length=2000)
    max_tokens: int = Field(default=160, ge=1, le=1024)
    overwrite: bool = False
    files: list[str] | None = Field(default=None, max_length=100_000)
