"""Messages about labels of runs, the trash, and comparisons of runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from simpletuner.server.schemas.base import ApiModel
from simpletuner.server.schemas.runs import RunImage, RunMetrics, RunSummary

Tag = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40)]
TrashKind = Literal[
    "run", "dataset", "checkpoint", "image", "captions", "draft", "job", "lora", "prompts"
]


class RunLabel(ApiModel):
    """The label that the user has given a run.

    name: shown instead of the folder's name, "" for that one. archived: hidden from the list.
    """

    name: str = Field(default="", max_length=80)
    tags: list[Tag] = Field(default_factory=list, max_length=20)
    note: str = Field(default="", max_length=10_000)
    archived: bool = False


class TrashEntry(ApiModel):
    """Something that was deleted together, and can be restored together.

    label: its name. size_bytes: of its files.
    """

    id: str
    kind: TrashKind
    label: str
    deleted_t: float
    size_bytes: int


class RunEvaluation(ApiModel):
    """One held-out loss.

    change, change_se: the difference from step 0 and its standard error.
    """

    step: int
    split: str
    dataset: str
    loss: float
    change: float
    change_se: float
    best: bool


class RunScore(ApiModel):
    """One score of generated images. error: its standard error. unit "share": parts of 1."""

    step: int
    metric: str
    name: str
    value: float
    error: float
    unit: str


class ComparedRun(ApiModel):
    """One run of a comparison."""

    summary: RunSummary
    metrics: RunMetrics
    evaluations: list[RunEvaluation]
    scores: list[RunScore]


class ComparedSetting(ApiModel):
    """An option that differs between the runs. values: one for each run, None if it is not set."""

    name: str
    values: list[Any]


class ComparedImages(ApiModel):
    """The images of one prompt, size and seed. images: those of each run, oldest step first."""

    prompt: str
    seed: int
    width_px: int
    height_px: int
    weights: str
    images: list[list[RunImage]]


class Comparison(ApiModel):
    """Several runs next to each other, in the order of the request."""

    runs: list[ComparedRun]
    settings: list[ComparedSetting]
    images: list[ComparedImages]
