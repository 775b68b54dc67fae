"""Types of the dataset file after it was checked and the defaults were filled in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.data.caption_variants import CaptionVariants
from simpletuner.data.geometry import ResizeCropConfig


@dataclass(frozen=True)
class CaptionTable:
    """A table of captions. format: "csv", "jsonl" or "parquet".

    filename_column, caption_columns: None and empty are the usual names. fallback_column: read
    where the captions of a row are empty.
    """

    path: Path
    format: str
    filename_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    fallback_column: str | None = None


@dataclass(frozen=True)
class ActivePeriod:
    """When a dataset is trained on.

    From start_epoch to end_epoch, both included and counted from 1, and in the optimizer steps
    after start_step up to and including end_step; both must hold. None is the end of the run.
    """

    start_epoch: int = 1
    end_epoch: int | None = None
    start_step: int = 0
    end_step: int | None = None

    def __str__(self) -> str:
        epochs = f"epochs {self.start_epoch} to {self.end_epoch or 'the last'}"
        return f"{epochs}, steps {self.start_step + 1} to {self.end_step or 'the last'}"

    def holds(self, step: int, epoch: int) -> bool:
        """Return whether the dataset is active. step: completed steps. epoch: from 0."""
        in_epochs = self.start_epoch <= epoch + 1 <= (self.end_epoch or epoch + 1)
        return in_epochs and self.start_step <= step < (self.end_step or step + 1)


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset of images.

    dataset_type: "image" is trained on; "eval" is held out: centre crop, first caption, once per
    measurement. instance_data_dir: an existing folder, absolute; nothing in it is changed.
    instance_prompts: alternatives; empty when the dataset has none. repeats: extra passes over
    every sample in an epoch; 0 is one pass. probability: fraction of the dataset per epoch,
    relative to the largest of the run (see sample_order.py). max_num_samples: a subset that depends
    only on the dataset's id and the file names. type: "local", or "webdataset" for tar files in the
    folder. caption_table: None with captions elsewhere. caption_filters: see caption_filters.py.
    caption_variants: None where captions are used as they are. caption_weights: of the first,
    second ... alternative, the last for all that follow; empty where all have the same.
    timestep_sampling_offset: added to logit(sigma).
    """

    id: str
    dataset_type: str
    instance_data_dir: Path
    resize_crop: ResizeCropConfig = field(default_factory=ResizeCropConfig)
    caption_strategy: str = "textfile"
    instance_prompts: tuple[str, ...] = ()
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False
    disable_multiline_split: bool = False
    repeats: int = 0
    probability: float = 1.0
    max_num_samples: int | None = None
    type: str = "local"
    caption_table: CaptionTable | None = None
    caption_filters: tuple[str, ...] = ()
    caption_variants: CaptionVariants | None = None
    caption_weights: tuple[float, ...] = ()
    timestep_sampling_offset: float = 0.0
    active: ActivePeriod = ActivePeriod()


@dataclass(frozen=True)
class DatasetFile:
    """Content of the dataset file.

    text_cache_dir: absolute, from the text_embeds entry, None when not given. notices: about fields
    that have no effect, one sentence each.
    """

    train: tuple[DatasetConfig, ...]
    eval: tuple[DatasetConfig, ...]
    text_cache_dir: Path | None
    notices: tuple[str, ...] = ()
