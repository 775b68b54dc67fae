"""What happens in a run, as data. `events.jsonl` is the record; terminal, trackers and report read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Event:
    """Root of all events. `kind` is the word written in the file."""

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind


Emit = Callable[[Event], None]


@dataclass(frozen=True)
class RunStarted(Event, kind="run_started"):
    """First line of every process that works on a run."""

    version: str
    run_dir: str
    model: str
    device: str
    total_steps: int
    resumed_step: int


@dataclass(frozen=True)
class NoticeIssued(Event, kind="noted"):
    """Worth one line to a person; nothing is wrong."""

    message: str


@dataclass(frozen=True)
class WarningIssued(Event, kind="warned"):
    """Something is not as the person probably meant it; the run goes on."""

    message: str


@dataclass(frozen=True)
class StageStarted(Event, kind="stage_started"):
    """A stage with known or unknown length begins (scan, encode text, encode images, load, train)."""

    stage: str
    total: int | None
    unit: str


@dataclass(frozen=True)
class StageProgress(Event, kind="stage_progress"):
    """`done` of `total` units; `rate` in units per second; `left_s` seconds left, None when unknown."""

    stage: str
    done: int
    total: int | None
    rate: float
    left_s: float | None


@dataclass(frozen=True)
class StageCompleted(Event, kind="stage_done"):
    stage: str
    done: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class DatasetScanned(Event, kind="dataset_scanned"):
    """buckets: (width_px, height_px, samples); rejected: reason -> count."""

    dataset: str
    samples: int
    buckets: tuple[tuple[int, int, int], ...]
    rejected: dict[str, int]


@dataclass(frozen=True)
class StepCompleted(Event, kind="step"):
    """One optimizer step. seconds: wall time of the step. memory_gib: peak device memory, None on CPU."""

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
class WeightsSaved(Event, kind="saved"):
    """A checkpoint, or at the end the weights themselves, safely on disk."""

    step: int
    path: str
    seconds: float
    size_bytes: int


@dataclass(frozen=True)
class RunResumed(Event, kind="resumed"):
    step: int
    path: str


@dataclass(frozen=True)
class CheckpointSetAside(Event, kind="checkpoint_set_aside"):
    """A damaged checkpoint was renamed, never deleted; the one before it is used."""

    path: str
    reason: str


@dataclass(frozen=True)
class ImageSaved(Event, kind="image"):
    """A validation picture. path: relative to the run folder.

    weights: "base", "trained", "ema", or the LoRA at another strength, "strength 0.5".
    """

    step: int
    prompt_id: str
    prompt: str
    path: str
    seed: int
    width_px: int
    height_px: int
    weights: str


@dataclass(frozen=True)
class ContactSheetSaved(Event, kind="sheet"):
    """A contact sheet prompt x step. path: relative to the run folder."""

    step: int
    path: str


@dataclass(frozen=True)
class LossEvaluated(Event, kind="evaluated"):
    """Held-out loss. by_sigma: (sigma, loss). change, change_se: against step 0, paired per sample."""

    step: int
    dataset: str
    split: str
    loss: float
    change: float
    change_se: float
    by_sigma: tuple[tuple[float, float], ...]
    best: bool


@dataclass(frozen=True)
class ScoresComputed(Event, kind="scored"):
    """What a program reads from the pictures of `prompts` unseen prompts, drawn with the weights of the step.

    metric: as in evaluation_type. weights: "base", "trained" or "ema". rates: name -> (value, its standard
    error, how many were counted). unit: of the values; "share" is a part of 1.
    """

    step: int
    metric: str
    weights: str
    prompts: int
    rates: dict[str, tuple[float, float, int]]
    unit: str = "share"


@dataclass(frozen=True)
class RunFinished(Event, kind="finished"):
    """status: "done" or "stopped"."""

    step: int
    seconds: float
    status: str


@dataclass(frozen=True)
class RunFailed(Event, kind="failed"):
    step: int
    error: str
    exit_code: int


EVENT_CLASSES: dict[str, type[Event]] = {event.kind: event for event in Event.__subclasses__()}
