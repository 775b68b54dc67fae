"""Run folders and what is in them."""

from __future__ import annotations

from typing import Any

from simpletuner.server.wire.base import State, Wire


class Stage(Wire):
    """A stage that runs now. total None: unknown."""

    stage: str
    done: int
    total: int | None
    unit: str
    left_s: float | None


class RunSummary(Wire):
    """One line of the list. id is made of the run folder's path and never changes. sparkline: up to 60
    smoothed losses. job: its newest job, None for a run that was started by hand. begun: whether it has a run
    folder."""

    id: str
    name: str
    path: str
    state: State
    step: int
    total_steps: int | None
    loss: float | None
    left_s: float | None
    started_t: float | None
    changed_t: float | None
    sparkline: list[float]
    stage: Stage | None
    job: str | None
    message: str = ""
    picture: str | None = None
    begun: bool = True


class Checkpoint(Wire):
    """name: "checkpoint-500". marked: a person chose to keep it. best: lowest held-out loss."""

    name: str
    step: int
    size_bytes: int
    saved_t: float
    marked: bool
    best: bool
    files: list[str]


class Output(Wire):
    """A file at the top of the run folder that the training made: the LoRA."""

    path: str
    size_bytes: int


class RunDetail(Wire):
    summary: RunSummary
    model: str
    device: str
    config: dict[str, Any]
    changed: dict[str, Any]
    stages: list[Stage]
    stages_done: list[str]
    checkpoints: list[Checkpoint]
    outputs: list[Output]
    resumes: list[int]
    problems: list[str]
    notes: list[str]
    exit: dict[str, Any] | None
    events_end: int


class Metrics(Wire):
    """Columns of equal length, thinned to at most max_points (min and max of loss are kept). held_out:
    (step, split, loss). scores: (step, metric, name, rate). end: byte offset of the events that they are
    made of, to go on from over the live connection."""

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


class Picture(Wire):
    """A validation picture. path: relative to the run folder. weights: base, trained, ema, "strength 0.5"."""

    path: str
    step: int
    prompt_id: str
    prompt: str
    seed: int
    width_px: int
    height_px: int
    weights: str


class LogPart(Wire):
    """Bytes start..end of train.log as text; size: of the whole file now."""

    text: str
    start: int
    end: int
    size: int


class StopAsk(Wire):
    """insist: end the process now, without waiting for its save."""

    insist: bool = False


class ResumeAsk(Wire):
    """checkpoint None: the newest. max_train_steps: train for longer than before."""

    checkpoint: str | None = None
    max_train_steps: int | None = None


class MarkAsk(Wire):
    marked: bool
