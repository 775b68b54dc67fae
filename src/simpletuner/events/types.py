"""What happens in a run, as data. `events.jsonl` is the record; terminal, trackers and report read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Event:
    """Root of all events. `kind` is the word written in the file."""

    kind: ClassVar[str] = "event"


Emit = Callable[[Event], None]


@dataclass(frozen=True)
class RunStarted(Event):
    """First line of every process that works on a run."""

    kind: ClassVar[str] = "run_started"
    version: str
    run_dir: str
    model: str
    device: str
    total_steps: int
    resumed_step: int


@dataclass(frozen=True)
class Noted(Event):
    """Worth one line to a person; nothing is wrong."""

    kind: ClassVar[str] = "noted"
    message: str


@dataclass(frozen=True)
class Warned(Event):
    """Something is not as the person probably meant it; the run goes on."""

    kind: ClassVar[str] = "warned"
    message: str


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage with known or unknown length begins (scan, encode text, encode images, load, train)."""

    kind: ClassVar[str] = "stage_started"
    stage: str
    total: int | None
    unit: str


@dataclass(frozen=True)
class StageProgress(Event):
    """`done` of `total` units; `rate` in units per second; `left_s` seconds left, None when unknown."""

    kind: ClassVar[str] = "stage_progress"
    stage: str
    done: int
    total: int | None
    rate: float
    left_s: float | None


@dataclass(frozen=True)
class StageDone(Event):
    kind: ClassVar[str] = "stage_done"
    stage: str
    done: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class DatasetScanned(Event):
    """buckets: (width_px, height_px, samples); rejected: reason -> count."""

    kind: ClassVar[str] = "dataset_scanned"
    dataset: str
    samples: int
    buckets: tuple[tuple[int, int, int], ...]
    rejected: dict[str, int]


@dataclass(frozen=True)
class Stepped(Event):
    """One optimizer step. seconds: wall time of the step. memory_gib: peak device memory, None on CPU."""

    kind: ClassVar[str] = "step"
    step: int
    total: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    samples: int
    memory_gib: float | None = None


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint, or at the end the weights themselves, safely on disk."""

    kind: ClassVar[str] = "saved"
    step: int
    path: str
    seconds: float
    size_bytes: int


@dataclass(frozen=True)
class Resumed(Event):
    kind: ClassVar[str] = "resumed"
    step: int
    path: str


@dataclass(frozen=True)
class CheckpointSetAside(Event):
    """A damaged checkpoint was renamed, never deleted; the one before it is used."""

    kind: ClassVar[str] = "checkpoint_set_aside"
    path: str
    reason: str


@dataclass(frozen=True)
class ImageSaved(Event):
    """A validation picture. path: relative to the run folder.

    weights: "base", "trained", "ema", or the LoRA at another strength, "strength 0.5".
    """

    kind: ClassVar[str] = "image"
    step: int
    prompt_id: str
    prompt: str
    path: str
    seed: int
    width_px: int
    height_px: int
    weights: str


@dataclass(frozen=True)
class SheetSaved(Event):
    """A contact sheet prompt x step. path: relative to the run folder."""

    kind: ClassVar[str] = "sheet"
    step: int
    path: str


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out loss. by_sigma: (sigma, loss). change, change_se: against step 0, paired per sample."""

    kind: ClassVar[str] = "evaluated"
    step: int
    dataset: str
    split: str
    loss: float
    change: float
    change_se: float
    by_sigma: tuple[tuple[float, float], ...]
    best: bool


@dataclass(frozen=True)
class Scored(Event):
    """What a program reads from the pictures of `prompts` unseen prompts, drawn with the weights of the step.

    metric: as in evaluation_type. weights: "base", "trained" or "ema". rates: name -> (share that is right,
    its standard error, how many were counted).
    """

    kind: ClassVar[str] = "scored"
    step: int
    metric: str
    weights: str
    prompts: int
    rates: dict[str, tuple[float, float, int]]


@dataclass(frozen=True)
class Finished(Event):
    """status: "done" or "stopped"."""

    kind: ClassVar[str] = "finished"
    step: int
    seconds: float
    status: str


@dataclass(frozen=True)
class Failed(Event):
    kind: ClassVar[str] = "failed"
    step: int
    error: str
    exit_code: int


EVENTS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        RunStarted, Noted, Warned, StageStarted, StageProgress, StageDone, DatasetScanned, Stepped, Saved,
        Resumed, CheckpointSetAside, ImageSaved, SheetSaved, Evaluated, Scored, Finished,
        Failed,
    )
}  # fmt: skip
