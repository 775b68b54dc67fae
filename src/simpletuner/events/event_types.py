"""Events of a run, as data. The terminal, the trackers and the report read them.

`events.jsonl` is their record on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Event:
    """Base class of all events. `kind` is the name in the file."""

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind


Emit = Callable[[Event], None]


@dataclass(frozen=True)
class RunWorld:
    """The processes that train a run, as they were started.

    mode: "replicated" (each holds the whole base), "sharded" (FSDP2), or "zero1", "zero2", "zero3"
    (DeepSpeed). base_bytes_per_rank: bytes of the base's weights that the largest process holds.
    """

    processes: int
    mode: str
    base_bytes_per_rank: int


@dataclass(frozen=True)
class RunStarted(Event, kind="run_started"):
    """First event of every start of a run.

    world: None for one process. targets: sentences about masks, regularisation and preservation.
    """

    version: str
    run_dir: str
    model: str
    device: str
    total_steps: int
    resumed_step: int
    world: RunWorld | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoticeIssued(Event, kind="noted"):
    """A notice for the user; nothing is wrong."""

    message: str


@dataclass(frozen=True)
class WarningIssued(Event, kind="warned"):
    """A warning: something is probably not as the user intended. The run continues."""

    message: str


@dataclass(frozen=True)
class StageStarted(Event, kind="stage_started"):
    """Start of a stage, of known or unknown length: scan, encode images, load, train."""

    stage: str
    total: int | None
    unit: str


@dataclass(frozen=True)
class StageProgress(Event, kind="stage_progress"):
    """Progress of a stage: `done` of `total` units.

    rate: units per second. left_s: seconds left, None when unknown.
    """

    stage: str
    done: int
    total: int | None
    rate: float
    left_s: float | None


@dataclass(frozen=True)
class StageCompleted(Event, kind="stage_done"):
    """End of a stage. done: units. seconds: wall time."""

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
    """One optimizer step.

    seconds: wall time of the step. memory_gib: peak device memory, None on a CPU.
    """

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
    """A checkpoint, or at the end the weights, completely written to disk.

    programs: the programs that load the file, "" for a checkpoint.
    """

    step: int
    path: str
    seconds: float
    size_bytes: int
    programs: str = ""


@dataclass(frozen=True)
class RunResumed(Event, kind="resumed"):
    """The run continues from this checkpoint."""

    step: int
    path: str


@dataclass(frozen=True)
class CheckpointSetAside(Event, kind="checkpoint_set_aside"):
    """A damaged checkpoint was renamed, not deleted; the one before it is used."""

    path: str
    reason: str


@dataclass(frozen=True)
class ImageSaved(Event, kind="image"):
    """A validation image. path: relative to the run folder.

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
class PromptsChosen(Event, kind="prompts"):
    """The validation prompts, at every start of a run and whenever a user edits them.

    step: the last completed one. prompts: (id, prompt, negative prompt, seed), where the seed None
    is that of the run. edited: by a user while the run trains. sizes, strengths: one of each prompt
    where any has its own; size "" is those of the run, strength 1 the whole adapter.
    """

    step: int
    prompts: tuple[tuple[str, str, str, int | None], ...]
    edited: bool
    sizes: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()


@dataclass(frozen=True)
class ContactSheetSaved(Event, kind="sheet"):
    """A contact sheet of prompts and steps. path: relative to the run folder."""

    step: int
    path: str


@dataclass(frozen=True)
class LossEvaluated(Event, kind="evaluated"):
    """Held-out loss.

    by_sigma: (sigma, loss). change, change_se: the difference from step 0, paired per sample, and
    its standard error.
    """

    step: int
    dataset: str
    split: str
    loss: float
    change: float
    change_se: float
    by_sigma: tuple[tuple[float, float], ...]
    best: bool


@dataclass(frozen=True)
class VerdictReached(Event, kind="verdict"):
    """The verdict on the held-out losses.

    verdict: "learning" (still falling), "flat" (no improvement since since_step), "overfitting"
    (rising since since_step) or "unknown" (too few measurements). change, change_se: of the loss
    since since_step, paired over `samples` images, and its standard error.
    """

    step: int
    verdict: str
    since_step: int
    best_step: int
    samples: int
    change: float
    change_se: float


@dataclass(frozen=True)
class SampleLossesMeasured(Event, kind="sample_losses"):
    """Loss of each image on fixed noise, at the first measurement and at the last one.

    split: "eval" or "train". losses: sample id -> (before, after). resisting: images of the
    training set whose loss fell far less than that of the others, the worst first.
    """

    step: int
    dataset: str
    split: str
    losses: dict[str, tuple[float, float]]
    resisting: tuple[str, ...]


@dataclass(frozen=True)
class CaptionFitMeasured(Event, kind="caption_fit"):
    """Margins by which training images are predicted better with their own than other captions.

    margins: sample id -> mean loss with other captions minus the loss with its own, on the same
    noise, before the first step. unfit: images whose caption fits hardly better than the others,
    the worst first.
    """

    dataset: str
    margins: dict[str, float]
    unfit: tuple[str, ...]


@dataclass(frozen=True)
class WeightChangeMeasured(Event, kind="weight_change"):
    """Change of the trained matrices since the base: norm of delta W over norm of W.

    total: over all of them. blocks: name of a block -> the ratio in it. total_steps: length of the
    run; 0 in logs of earlier versions.
    """

    step: int
    total: float
    blocks: dict[str, float]
    total_steps: int = 0


@dataclass(frozen=True)
class KnowledgeCompared(Event, kind="knowledge"):
    """A score of what the base could do, before the training and now, with standard errors.

    metric: "retention" or "shapes". unit: as in ScoresComputed. change_se: that of after - before,
    paired over the prompts, whose seeds are the same; None where they cannot be paired.
    """

    step: int
    metric: str
    before: float
    before_se: float
    after: float
    after_se: float
    unit: str = "share"
    change_se: float | None = None


@dataclass(frozen=True)
class RateTried(Event, kind="rate_tried"):
    """A learning rate after `steps` of a search. loss: None where it diverged.

    change, change_se: its loss minus that of the best rate so far, paired over the images.
    """

    rate: float
    steps: int
    loss: float | None
    change: float
    change_se: float


@dataclass(frozen=True)
class RateChosen(Event, kind="rate_chosen"):
    """The result of a search.

    runner_up: None where every other rate was clearly worse earlier. change, change_se: loss of the
    runner-up minus that of the chosen rate. cost: of the search, in runs. at_edge: whether it is
    the lowest or the highest rate that was tried.
    """

    rate: float
    loss: float
    images: int
    runner_up: float | None
    change: float
    change_se: float
    cost: float
    at_edge: bool


@dataclass(frozen=True)
class ScoresComputed(Event, kind="scored"):
    """Scores of generated images of `prompts` unseen prompts.

    metric: as in evaluation_type. weights: "base", "trained" or "ema". rates: name -> (value, its
    standard error, how many images counted). unit: of the values; "share" is a fraction of 1.
    """

    step: int
    metric: str
    weights: str
    prompts: int
    rates: dict[str, tuple[float, float, int]]
    unit: str = "share"


@dataclass(frozen=True)
class RunFinished(Event, kind="finished"):
    """End of a run. status: "done" or "stopped"."""

    step: int
    seconds: float
    status: str


@dataclass(frozen=True)
class RunFailed(Event, kind="failed"):
    """The run ended with an error. step: the last completed one."""

    step: int
    error: str
    exit_code: int


EVENT_CLASSES: dict[str, type[Event]] = {event.kind: event for event in Event.__subclasses__()}
