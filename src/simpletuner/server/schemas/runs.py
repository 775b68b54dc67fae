"""Messages about runs and the files in their folders."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from simpletuner.server.schemas.base import ApiModel, JobState, Message
from simpletuner.server.schemas.configs import PromptEntries


class RunStage(ApiModel):
    """The progress of a stage that is running. total: None if unknown."""

    stage: str
    done: int
    total: int | None
    unit: str
    left_s: float | None


class RunSummary(ApiModel):
    """One row of the list of runs.

    id: derived from the path of the run folder, so it never changes. sparkline: up to 60 smoothed
    losses. job: id of the newest job, None for a run that was started from a terminal. `picture`:
    path of the newest validation image. begun: true if the run has a folder. tags, note, archived:
    as in RunLabel.
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
    message: Message = ""
    picture: str | None = None
    begun: bool = True
    tags: list[str] = Field(default_factory=list)
    note: str = ""
    archived: bool = False


class RunQuery(ApiModel):
    """A part of the list of runs.

    words: each must be in the name, a tag or the note. state: "active" includes queued runs,
    "ended" are those that stopped before their end. archived: list archived runs too. queued: list
    runs too that are only queued. sort: "progress" is the share of the steps, highest first.
    """

    offset: int = Field(default=0, ge=0, le=10_000_000)
    limit: int = Field(default=50, ge=1, le=500)
    words: str = Field(default="", max_length=200)
    state: Literal["any", "active", "done", "ended"] = "any"
    archived: bool = True
    queued: bool = True
    sort: Literal["newest", "name", "loss", "progress"] = "newest"


class RunPage(ApiModel):
    """A part of the list of runs.

    total: runs that match the query. all_runs: runs without its words, state and archived.
    archived: how many of these are archived. unread: how many of the runs that this part depends on
    have events that were not read yet; request it again.
    """

    total: int
    offset: int
    runs: list[RunSummary]
    all_runs: int
    archived: int
    unread: int = 0


class CheckpointInfo(ApiModel):
    """One checkpoint.

    name: "checkpoint-500". marked: the user chose to keep it. best: lowest held-out loss.
    """

    name: str
    step: int
    size_bytes: int
    saved_t: float
    marked: bool
    best: bool
    files: list[str]


class OutputFile(ApiModel):
    """A weight file that the training wrote to the run folder, such as the LoRA.

    programs: those that load it, such as "diffusers and ComfyUI"; "" if unknown.
    """

    path: str
    size_bytes: int
    programs: str


class RunProcesses(ApiModel):
    """The processes of a run. mode, base_bytes_per_rank: as in the event run_started."""

    processes: int
    mode: str
    base_bytes_per_rank: int


class HeldOutVerdict(ApiModel):
    """The verdict on the held-out losses of a run; the fields are those of the event `verdict`.

    verdict: "learning", "flat", "overfitting" or "unknown".
    """

    step: int
    verdict: str
    since_step: int
    best_step: int
    samples: int
    change: float
    change_se: float


class RunResume(ApiModel):
    """One resume of a run from a checkpoint.

    t: unix seconds. repeated_steps: steps after the checkpoint that the process before it had
    completed, and that were trained again.
    """

    t: float
    step: int
    checkpoint: str
    repeated_steps: int


class RunDetail(ApiModel):
    """Everything about a run except its metrics, images and log.

    world: None for one process. datasets: names of the datasets of the workspace that it uses.
    documents: other files to read, such as report.html. verdict: the last one, None without a
    held-out loss.
    """

    summary: RunSummary
    model: str
    device: str
    world: RunProcesses | None
    config: dict[str, Any]
    changed: dict[str, Any]
    stages: list[RunStage]
    stages_done: list[str]
    checkpoints: list[CheckpointInfo]
    outputs: list[OutputFile]
    documents: list[OutputFile]
    datasets: list[str]
    resumes: list[RunResume]
    verdict: HeldOutVerdict | None
    problems: list[Message]
    notes: list[Message]
    exit: dict[str, Any] | None
    events_end: int


class RunMetrics(ApiModel):
    """The steps of a run as columns of equal length, at most max_points long.

    Downsampling keeps the minima and maxima of the loss. held_out: (step, split, loss). scores:
    (step, metric, name, value, unit), unit "share" for parts of 1. end: byte offset in events.jsonl
    up to which the events are included, from which the live connection continues.
    """

    step: list[int]
    t: list[float]
    loss: list[float | None]
    learning_rate: list[float]
    grad_norm: list[float | None]
    seconds: list[float]
    memory_gib: list[float | None]
    held_out: list[tuple[int, str, float]]
    scores: list[tuple[int, str, str, float, str]]
    resumes: list[int]
    end: int


class EpochRow(ApiModel):
    """The steps of one epoch, counted from 1. loss: their mean, None without a finite one."""

    epoch: int
    first_step: int
    last_step: int
    loss: float | None
    seconds: float


class HeldOutRow(ApiModel):
    """One measurement of a held-out loss. Fields as in the event `evaluated`."""

    step: int
    dataset: str
    split: str
    loss: float | None
    change: float | None
    change_se: float | None
    best: bool


class RunTables(ApiModel):
    """The epochs of a run, and its held-out losses, both in order."""

    epochs: list[EpochRow]
    held_out: list[HeldOutRow]


class RunImage(ApiModel):
    """A validation image.

    path: relative to the run folder. weights: "base", "trained", "ema" or, for a scaled LoRA,
    "strength 0.5".
    """

    path: str
    step: int
    prompt_id: str
    prompt: str
    seed: int
    width_px: int
    height_px: int
    weights: str


class RunPrompt(ApiModel):
    """A validation prompt of a run; the fields are those of PromptEntry."""

    name: str
    prompt: str
    negative_prompt: str
    seed: int | None
    size: str = ""
    adapter_strength: float = 1.0


class RunPrompts(ApiModel):
    """The validation prompts of a run.

    editable: whether they can be edited now. pending: they are used from the next validation on.
    """

    prompts: list[RunPrompt]
    editable: bool
    pending: bool


class RunPromptsWrite(ApiModel):
    """All validation prompts of a run, from its next validation on."""

    prompts: PromptEntries


class LogPart(ApiModel):
    """Bytes start to end of train.log as text. size: current size of the whole file."""

    text: str
    start: int
    end: int
    size: int


class LogLine(ApiModel):
    """A line of train.log; number: counted from 1."""

    number: int
    text: str


class LogMatches(ApiModel):
    """Lines of train.log that contain a text. count: of all; lines: the last of them."""

    count: int
    lines: list[LogLine]


class StopRequest(ApiModel):
    """A request to stop a run. `insist`: kill the process now, without waiting for a checkpoint."""

    insist: bool = False


class ResumeRequest(ApiModel):
    """A request to resume a run.

    checkpoint: None for the newest. max_train_steps: a new length, or None. learning_rate: another
    one from here on, which the run records, or None.
    """

    checkpoint: str | None = None
    max_train_steps: int | None = None
    learning_rate: float | None = None


class MarkRequest(ApiModel):
    """Mark a checkpoint, so that the training never deletes it, or unmark it."""

    marked: bool
