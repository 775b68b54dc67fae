"""Run folders and what is in them."""

from __future__ import annotations

from typing import Any

from simpletuner.server.schemas.base import ApiModel, JobState


class RunStage(ApiModel):
    """A stage that runs now. total None: unknown."""

    stage: str
    done: int
    total: int | None
    unit: str
    left_s: float | None


class RunSummary(ApiModel):
    """One line of the list. id is made of the run folder's path and never changes. sparkline: up to 60
    smoothed losses. job: its newest job, None for a run that was started by hand. begun: whether it has a run
    folder.
    """

    id: str
    name: str
    path: str
    state: JobState
    step: int
    total_steps: int | None
    loss: float | None
    left_s: float | None
    started_t: float | None
    changed_t: float | None
    sparkline: list[float]
    stage: RunStage | None
    job: str | None
    message: str = ""
    picture: str | None = None
    begun: bool = True


class CheckpointInfo(ApiModel):
    """name: "checkpoint-500". marked: a person chose to keep it. best: lowest held-out loss."""

    name: str
    step: int
    size_bytes: int
    saved_t: float
    marked: bool
    best: bool
    files: list[str]


class OutputFile(ApiModel):
    """A file at the top of the run folder that the training made: the LoRA."""

    path: str
    size_bytes: int


class RunDetail(ApiModel):
    summary: RunSummary
    model: str
    device: str
    config: dict[str, Any]
    changed: dict[str, Any]
    stages: list[RunStage]
    stages_done: list[str]
    checkpoints: list[CheckpointInfo]
    outputs: list[OutputFile]
    resumes: list[int]
    problems: list[str]
    notes: list[str]
    exit: dict[str, Any] | None
    events_end: int


class RunMetrics(ApiModel):
    """Columns of equal length, thinned to at most max_points (min and max of loss are kept). held_out:
    (step, split, loss). scores: (step, metric, name, rate). end: byte offset of the events that they are
    made of, to go on from over the live connection.
    """

    step: list[int]
    t: list[float]
    loss: list[float | None]
    learning_rate: list[float]
    grad_norm: list[float | None]
    seconds: list[float]
    memory_gib: list[float | None]
    held_out: list[tuple[int, str, float]]
    scores: list[tuple[int, str, str, float]]
    resumes: list[int]
    end: int


class RunImage(ApiModel):
    """A validation picture. path: relative to the run folder. weights: base, trained, ema, "strength 0.5"."""

    path: str
    step: int
    prompt_id: str
    prompt: str
    seed: int
    width_px: int
    height_px: int
    weights: str


class LogPart(ApiModel):
    """Bytes start..end of train.log as text; size: of the whole file now."""

    text: str
    start: int
    end: int
    size: int


class StopRequest(ApiModel):
    """insist: end the process now, without waiting for its save."""

    insist: bool = False


class ResumeRequest(ApiModel):
    """checkpoint None: the newest. max_train_steps: train for longer than before."""

    checkpoint: str | None = None
    max_train_steps: int | None = None


class MarkRequest(ApiModel):
    marked: bool
