"""A dataset as the person described it, checked and with the run's defaults filled in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.data.geometry import ResizeCropConfig


@dataclass(frozen=True)
class DatasetConfig:
    """A folder of pictures.

    dataset_type: "image" is trained on; "eval" is held out: centre crop, first caption, one visit.
    instance_data_dir: an existing folder, absolute; it is only ever read. instance_prompts:
    alternatives; empty when the dataset has none. repeats: EXTRA passes over every sample in an
    epoch; 0 is one visit. probability: share of the dataset shown per epoch, relative to the
    largest of the run (see order). max_num_samples: a subset that depends on the dataset's id and
    the file names alone.
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


@dataclass(frozen=True)
class DatasetFile:
    """What the dataset file says. text_cache_dir: absolute, from the text_embeds set, None when not given.

    notes: fields that were read and are not needed here, one sentence each.
    """

    train: tuple[DatasetConfig, ...]
    eval: tuple[DatasetConfig, ...]
    text_cache_dir: Path | None
    notices: tuple[str, ...] = ()
